"""Prompts whose conditionings differ in shape: they share no forward, and nothing that is computed
depends on that."""

import numpy as np
import pytest
import torch
from engine_cases import PlainRuntime, quiet_pool, small_config
from kernel_cases import assert_close
from ragged_policy import RaggedPolicy, Sharded
from test_graphs import Recorded, cache_of

from tempflow.errors import UserError
from tempflow.models import Conditions, by_shape
from tempflow.models.embeddings import EmbeddingCache, EmbeddingStore, embed_one
from tempflow.models.opened import Opened
from tempflow.run import evaluation
from tempflow.run.refining import Search, refine
from tempflow.training import batches, micro_batches, shares
from tempflow.training.batches import make_batches, padding_of, select
from tempflow.training.credit import loss_weights, make_parts
from tempflow.training.rollout import gather_rewards, plan_iteration, roll_out
from tempflow.training.session import assemble
from tempflow.training.update import Part, Updater
from tempflow.types import Example, Size

FP32 = 1e-5
TEXTS = ["one", "one two", "three words here", "three other words", "a b c d e f", "two more"]
PROMPTS = [
    Example(text, negative)
    for text, negative in zip(TEXTS, [None, None, None, None, "x y", None], strict=True)
]

SMALL = {
    "height": 16,
    "width": 24,
    "num_steps": 4,
    "guidance_scale": 2.0,
    "micro_batch": 5,
    "lanes": 1,
    "plan": {"seeds": 2, "children": 2, "branch_steps": [0, 2]},
}


@pytest.fixture
def ragged():
    return RaggedPolicy()


def session_of(policy, *, graphs=None, **changes):
    config = small_config(
        rollout=SMALL | changes.pop("rollout", {}),
        data={"prompts_per_iteration": len(PROMPTS)},
        **changes,
    )
    with quiet_pool(config) as (pool, specs):
        return assemble(config, policy, EmbeddingCache(policy), pool, specs, PROMPTS, graphs=graphs)


def rolled(session, prompts):
    with quiet_pool(session.config) as (session.pool, _):
        found = roll_out(
            session, plan_iteration(session, prompts, 0), 0, session.config.rollout.suffix
        )
        return found, gather_rewards(session, found)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_velocity_is_that_of_one_row(ragged, guidance):
    """Guided by two forwards, whatever the shapes; the negative's may be another than the prompt's.
    By one through ZeRO-3's engine."""
    conditions, size = ragged.encode_each(PROMPTS), Size(16, 24)
    x, sigma = (
        torch.randn(len(PROMPTS), *ragged.latent_shape(size)),
        torch.linspace(1, 0.2, len(PROMPTS)),
    )
    groups = by_shape(conditions.shapes)
    assert groups == [[0], [1, 5], [2, 3], [4]]
    for places in groups:
        ragged.rows_seen.clear()
        got = ragged.velocity(
            ragged.denoiser(), x[places], sigma[places], conditions.rows(places), size, guidance
        )
        assert ragged.rows_seen == [len(places)] * (2 if guidance > 1 else 1)
        for n, place in enumerate(places):
            expected = ragged.expected(PROMPTS[place], x[place], sigma[place], guidance)
            assert_close("velocity", got[n], expected, FP32)
        ragged.rows_seen.clear()
        again = ragged.velocity(
            Sharded(ragged.denoiser()),
            x[places],
            sigma[places],
            conditions.rows(places),
            size,
            guidance,
        )
        assert ragged.rows_seen == [len(places) * (2 if guidance > 1 else 1)]
        assert_close("velocity", again, got, FP32)


def test_sample_groups_its_prompts(ragged):
    size = {"height": 16, "width": 24, "num_steps": 3, "guidance_scale": 2.0, "decode": False}
    x = torch.randn(4, *ragged.latent_shape(Size(16, 24)))
    together = ragged.sample(TEXTS[:4], latents=x, **size)
    for n, text in enumerate(TEXTS[:4]):
        assert_close(text, together[n], ragged.sample(text, latents=x[n : n + 1], **size)[0], FP32)


@pytest.mark.parametrize(
    "changes",
    [{}, {"suffix": {"stride": 2, "order": 2}}, {"lanes": 2}, {"micro_batch": 1}],
    ids=str,
)
def test_a_prompt_is_rolled_out_as_if_it_were_alone(ragged, changes):
    session = session_of(ragged, rollout=changes)
    together, _ = rolled(session, list(range(len(PROMPTS))))
    states = {(s.unit.prompt_id, s.unit.seed, s.step): s for s in together.kept.states}
    assert len(states) == len(PROMPTS) * 2 * 2
    for prompt in range(len(PROMPTS)):
        for alone in rolled(session, [prompt])[0].kept.states:
            state = states[prompt, alone.unit.seed, alone.step]
            for name in ("x", "children", "log_prob"):
                assert_close(name, getattr(state, name), getattr(alone, name), FP32)
    if changes == {"micro_batch": 1}:
        assert together.stats.batches == together.stats.forwards


def test_padded_forwards_have_few_shapes(ragged):
    """A power of two for each shape, no more than its rows need, captured once and used again in
    the next iteration."""
    graphs, notes = cache_of(Recorded(nbytes=1), limit_bytes=100)
    session = session_of(ragged, graphs=graphs, rollout={"micro_batch": 16})
    first, _ = rolled(session, [0, 2, 3])
    assert graphs.captures == len(graphs) == 2 and not notes, "10 rows of one word and 20 of three"
    assert first.stats.padded == first.stats.batches * 16 - first.stats.forwards
    rolled(session, [2, 0, 3])
    assert graphs.captures == 2
    eager, _ = rolled(session_of(RaggedPolicy(), rollout={"micro_batch": 16}), [0, 2, 3])
    for one, other in zip(first.kept.states, eager.kept.states, strict=True):
        assert_close("children", one.children, other.children, FP32)


def test_more_shapes_than_graphs_fit_run_eagerly(ragged):
    """Instead of being captured anew in every iteration."""
    capture = Recorded(nbytes=60)
    graphs, notes = cache_of(capture, limit_bytes=100)
    session = session_of(ragged, graphs=graphs)
    for _ in range(6):
        rolled(session, [0, 1, 2])
    assert len(capture.shapes) <= 6 and len(graphs) == 1
    assert (
        len(notes) == 1
        and "more shapes than rollout.graph_limit_mb" in notes[0]
        and "eagerly" in notes[0]
    )


# ----------------------------------------------------------------------------------------- training
def gradient_of(session, parts):
    runtime = PlainRuntime(session.policy)
    updater = Updater(runtime, session.sampler, session.objective, session.penalty, session.embed)
    for part in parts:
        updater.update(part, 1.0)
    return torch.cat([g.flatten() for g in runtime.gradient().values()])


def credited(session):
    found, scored = rolled(session, list(range(len(PROMPTS))))
    return found, session.advantage(found.layout.slots, scored.rewards)


def parts_of(session, states, credit, rolled_out, micro_batch, shapes=True):
    chosen = select(states, credit, session.penalty)
    weights = loss_weights(session, rolled_out)
    given = session.shapes([one.state for one in chosen]) if shapes else None
    made = make_batches(chosen, padding_of(states), micro_batch, weights, "cpu", given)
    return Part.of(made, len(rolled_out.kept.states))


def test_the_gradient_is_that_of_one_state_at_a_time(ragged):
    session = session_of(
        ragged, training={"micro_batch": 3, "penalty": {"type": "kl", "coef": 0.1}}
    )
    found, credit = credited(session)
    (part,) = make_parts(session, found, credit)
    assert (
        max(len(batch.x) for batch in part.batches) == 3
        and sum(batch.real for batch in part.batches) == 24
    )
    for batch in part.batches:
        assert (
            len(set(session.embeddings.shapes([PROMPTS[unit.prompt_id] for unit in batch.units])))
            == 1
        )
    got = gradient_of(session, [part])
    alone = gradient_of(
        session, [parts_of(session, found.kept.states, credit, found, 1, shapes=False)]
    )
    assert_close("gradient", got, alone, FP32)
    assert got.norm() > 0


def test_two_ranks_have_the_gradient_of_one(ragged, monkeypatch):
    """And as many micro-batches each, though one has a single shape and the other three."""
    session = session_of(ragged)
    found, credit = credited(session)
    whole = gradient_of(session, make_parts(session, found, credit))
    mine = [
        [s for s in found.kept.states if (s.unit.prompt_id in (2, 3)) is first]
        for first in (True, False)
    ]
    needed = []
    with monkeypatch.context() as here:
        here.setattr(batches.distributed, "reduce", lambda value, op: needed.append(value) or value)
        for states in mine:
            parts_of(session, states, credit, found, 8)
        here.setattr(batches.distributed, "reduce", lambda value, op: max(needed))
        shared = [parts_of(session, states, credit, found, 8) for states in mine]
    assert sorted(needed) == [1, 3] and [len(part.batches) for part in shared] == [3, 3]
    assert_close("gradient", gradient_of(session, shared), whole, FP32)


def test_a_rank_without_enough_states_adds_padding(monkeypatch):
    monkeypatch.setattr(batches.distributed, "reduce", lambda value, op: 5)
    assert batches._ragged(["a", "b", "a"], 8) == [([0], 1), ([2], 1), ([1], 1), ([], 1), ([], 1)]
    assert batches._ragged([], 8) == [([], 1)] * 5
    monkeypatch.setattr(batches.distributed, "reduce", lambda value, op: value)
    assert batches._ragged([], 8) == []
    sizes = [size for _, size in batches._ragged(["a"] * 9 + ["b"] * 4, 4)]
    assert sizes == [3, 3, 3, 4]


def test_sizes_are_measured_with_the_longest_prompt(ragged, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ragged,
        "velocity",
        lambda denoiser, x, sigma, conditioning, *_: seen.append(conditioning) or x,
    )
    micro_batches._velocity(session_of(ragged), [0, 1, 2])
    assert {name: tuple(tensor.shape) for name, tensor in seen[0].items()} == {
        "text": (3, 9, 4),
        "negative_text": (3, 9, 4),
    }


def test_sharded_rollouts_without_a_copy_are_refused(ragged, monkeypatch):
    """Ranks would wait for each other: their numbers of forwards differ with the shapes of their
    prompts."""
    monkeypatch.setattr(shares.distributed, "world_size", lambda: 2)
    config = small_config(
        rollout={"replica": False},
        deepspeed={"zero_optimization": {"stage": 3}},
        eval={"prompts": 6},
    )
    shares.check_shares(config, PROMPTS, PROMPTS)
    monkeypatch.setattr(shares, "family_of", lambda path: RaggedPolicy)
    with pytest.raises(UserError, match="rollout.replica: false under ZeRO-3 .* differ in shape"):
        shares.check_shares(config, PROMPTS, PROMPTS)


# ------------------------------------------------------------------------------ embeddings, drawing
def test_the_cache_gives_what_the_policy_encodes(ragged):
    """Also where it holds one embedding; shapes are remembered longer than what they are of."""
    for capacity in (None, 1):
        cache, expected = EmbeddingCache(ragged, capacity=capacity), ragged.encode_each(PROMPTS)
        got = cache.each(PROMPTS)
        assert by_shape(got.shapes) == by_shape(expected.shapes)
        for places in by_shape(got.shapes):
            for name, tensor in got.rows(places).items():
                assert torch.equal(tensor, expected.rows(places)[name]), name
        embedded = len(ragged.embedded)
        cache.shapes(PROMPTS)
        assert len(ragged.embedded) == embedded


def test_embeddings_on_disk_keep_their_shapes(ragged, tmp_path):
    store = EmbeddingStore(tmp_path, {})
    for example in [*PROMPTS, *map(ragged.opposed, PROMPTS)]:
        store.write(ragged.identity(example), embed_one(ragged, example))
    ragged.embed = None
    cache = EmbeddingCache(ragged, store)
    assert [shape[0][0][1][0] for shape in cache.shapes(PROMPTS)] == [
        len(text.split()) for text in TEXTS
    ]


def test_rows_of_conditions_are_of_one_shape(ragged):
    conditions = ragged.encode_each(PROMPTS)
    with pytest.raises(ValueError):
        conditions.rows([0, 1])
    fixed = Conditions.equal({"text": torch.arange(3)})
    assert fixed.shapes == [None] * 3 and fixed.rows([2, 0])["text"].tolist() == [2, 0]


def opened(policy):
    config = small_config(rollout={**SMALL, "micro_batch": 4}, eval={"num_steps": 3})
    return Opened(config, policy, EmbeddingCache(policy))


def test_an_evaluation_is_in_the_order_of_the_prompts(ragged):
    model, chosen = opened(ragged), [0, 1, 2, 3, 5]
    parts = list(evaluation.draw(model, PROMPTS, chosen))
    assert [part for part, _, _ in parts] == [[0], [1, 5], [2, 3]]
    with quiet_pool(model.config) as (pool, specs):
        scored = evaluation.evaluate(pool, specs, PROMPTS, iter(parts), keep=2)
    assert list(scored.indices) == chosen and sorted(scored.files) == [0, 1]
    images = {i: image for part, made, _ in parts for i, image in zip(part, made, strict=True)}
    with quiet_pool(model.config) as (pool, specs):
        for n, i in enumerate(chosen):
            one = evaluation.evaluate(
                pool, specs, PROMPTS, iter([([i], images[i][None], np.ones(1, bool))]), keep=0
            )
            assert one.reward[0] == pytest.approx(scored.reward[n])


def test_refinement_of_prompts_of_many_shapes(ragged):
    def judge(places, latents):
        return lambda: (
            np.zeros((len(places), 2, 2, 3), np.uint8),
            latents.flatten(1).mean(1).double().numpy(),
        )

    *_, together = refine(opened(ragged), PROMPTS, judge, Search(2, 3, (1, 2)))
    assert np.isfinite(together.rewards).all() and together.drawn.tolist() == [9] * len(PROMPTS)
