"""Images that hold NaN or infinity: never scored, masked, counted, and out of every mean, gradient
and picture file."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_cases import Iteration, PlainRuntime, flat, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import assert_close
from PIL import Image
from run_cases import train

from tempflow.media import no_image
from tempflow.models import Sampler
from tempflow.rewards import RewardPool, parse_rewards
from tempflow.run import evaluation
from tempflow.run.failures import TooManyFailed, check_failed
from tempflow.run.means import gain_of, is_sure, mean_of
from tempflow.training.batches import padding_of
from tempflow.types import Example, Size

NAN, INF = float("nan"), float("inf")


# ----------------------------------------------------------------------------------------- decoding
BROKEN = {
    "one NaN": lambda x: x.view(-1)[7:8].fill_(NAN),
    "one infinity": lambda x: x.view(-1)[:1].fill_(INF),
    "last, negative": lambda x: x.view(-1)[-1:].fill_(-INF),
    "all NaN": lambda x: x.fill_(NAN),
    "too large for the VAE": lambda x: x.fill_(3e38),
}


@pytest.mark.parametrize("how", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("row", [0, 2])
def test_what_is_not_finite_is_no_image(policy, how, row):
    """It is marked and told apart; the images beside it are the same bits as without it."""
    latents = torch.randn(
        3, *policy.latent_shape(Size(32, 96)), generator=torch.Generator().manual_seed(0)
    )
    whole, finite = policy.decode(latents, Size(32, 96))
    assert finite.tolist() == [True] * 3 and whole.dtype == np.uint8
    how(latents[row])
    images, finite = policy.decode(latents, Size(32, 96))
    assert finite.tolist() == [i != row for i in range(3)]
    assert (images[row] == no_image(32, 96)).all() and (images[finite] == whole[finite]).all()
    assert len(np.unique(no_image(32, 96).reshape(-1, 3), axis=0)) == 2, (
        "no plain image, which a reward or a person takes for one"
    )


def test_a_decoder_that_overflows_makes_no_image(policy, monkeypatch):
    real = policy.pipe.vae.decode

    def decode(x, return_dict):
        (pixels,) = real(x, return_dict=return_dict)
        pixels[1, 2, 5, 6] = -INF
        return (pixels,)

    monkeypatch.setattr(policy.pipe.vae, "decode", decode)
    _, finite = policy.decode(torch.zeros(3, *policy.latent_shape(Size(32, 96))), Size(32, 96))
    assert finite.tolist() == [True, False, True]


def test_the_library_says_that_an_image_is_missing(policy, monkeypatch):
    latents, broken = (
        torch.zeros(2, *policy.latent_shape(Size(32, 96))),
        torch.zeros(2, *policy.latent_shape(Size(32, 96))),
    )
    broken[0, 0, 0] = NAN
    monkeypatch.setattr(Sampler, "integrate", lambda *args, **call: broken)
    call = {"latents": latents, "height": 32, "width": 96, "num_steps": 2, "guidance_scale": 0.0}
    with pytest.warns(UserWarning, match="1 of 2 images hold NaN or infinity"):
        images = policy.sample(["a", "b"], **call)
    assert (np.asarray(images[0]) == no_image(32, 96)).all()
    assert policy.sample(["a", "b"], decode=False, **call)[0].isnan().any(), (
        "latents are left as they are"
    )


# --------------------------------------------------------------------------------------- evaluation
def level(images, prompts, metadata):
    """The first pixel; for images above 200 no value; never asked about a missing image."""
    assert not any((image == no_image(*image.shape[:2])).all() for image in images)
    first = images[:, 0, 0, 0].astype(float)
    return np.where(first > 200, NAN, first)


def scored(levels, finite, batch, keep=0):
    """The evaluation of plain images of these levels; those that are not finite hold the mark."""
    images = np.stack(
        [
            np.full((16, 16, 3), x if ok else 0, np.uint8) if ok else no_image(16, 16)
            for x, ok in zip(levels, finite)
        ]
    )
    places = range(0, len(levels), batch)
    drawn = (
        (
            list(range(i, min(i + batch, len(levels)))),
            images[i : i + batch],
            np.array(finite[i : i + batch]),
        )
        for i in places
    )
    specs = parse_rewards({f"{__name__}:level": 1.0, "jpeg": 0})
    prompts = [Example(f"prompt {i}") for i in range(len(levels))]
    with RewardPool(specs, workers=0) as pool:
        return evaluation.evaluate(pool, specs, prompts, drawn, keep), prompts


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 255), st.booleans()), min_size=1, max_size=9),
    st.integers(1, 4),
)
def test_an_evaluation_says_what_it_is_made_of(images, batch):
    levels, finite = zip(*images)
    found, _ = scored(levels, finite, batch)
    good = [x for x, ok in images if ok and x <= 200]
    mean = found.mean()
    assert (mean.scored, mean.failed) == (len(good), len(images) - len(good))
    assert found.counts() == (len(images), len(images) - len(good), finite.count(False))
    row = evaluation.metrics(found)
    assert row["eval/scored"] == len(good) and row["eval/failed"] == len(images) - len(good)
    assert row["eval/jpeg/failed"] == finite.count(False) == row.get("eval/not_finite", 0)
    assert ("eval/reward" in row) == bool(good) and (
        not good or row["eval/reward"] == pytest.approx(np.mean(good))
    )
    if len(good) > 1:
        assert row["eval/reward/stderr"] == pytest.approx(
            np.std(good, ddof=1) / len(good) ** 0.5, abs=1e-9
        )


def test_ranks_together_are_one_evaluation():
    levels, finite = [3, 250, 7, 9, 11], [True, True, False, True, True]
    whole, _ = scored(levels, finite, 2)
    parts = []
    for rank in (0, 1):
        one, _ = scored(levels[rank::2], finite[rank::2], 2)
        parts.append(replace(one, indices=[rank + 2 * i for i in one.indices]))
    merged = evaluation.merge(parts)
    assert (
        evaluation.metrics(merged) == evaluation.metrics(whole) and merged.indices == whole.indices
    )
    assert (
        merged.details["jpeg"][:2] == whole.details["jpeg"][:2]
        and "NaN or infinity" in merged.details["jpeg"][2]
    )


def test_samples_mark_what_is_missing(tmp_path):
    found, prompts = scored([5, 250, 9], [True, True, False], 2, keep=3)
    evaluation.write_samples(tmp_path / "000000", found, prompts, {"iteration": 0})
    info = json.loads(
        (tmp_path / "000000/samples.json").read_text(),
        parse_constant=lambda text: pytest.fail(text),
    )
    assert (info["reward"], info["stderr"], info["scored"], info["failed"]) == (5.0, None, 1, 2)
    assert [item["reward"] for item in info["items"]] == [5.0, None, None]
    assert "NaN or infinity" in info["items"][2]["details"]["jpeg"]
    assert (np.asarray(Image.open(tmp_path / "000000/0002.png")) == no_image(16, 16)).all()


def test_samples_name_a_target_that_the_metadata_names(tmp_path):
    """For the report, which marks the letters of a reading against it."""
    found, prompts = scored([5, 9], [True, True], 2, keep=2)
    prompts[1].metadata["ocr_target"] = "OPEN"
    evaluation.write_samples(tmp_path / "000000", found, prompts, {"iteration": 0})
    items = json.loads((tmp_path / "000000/samples.json").read_text())["items"]
    assert [item.get("ocr_target") for item in items] == [None, "OPEN"]


def test_samples_show_their_condition_images(tmp_path):
    """In a row of the image's height, and where they came from; prompts without stay as they
    were."""
    found, prompts = scored([5, 9, 7], [True] * 3, 3, keep=3)
    wide, narrow = (np.full((size, 20, 3), level, np.uint8) for size, level in ((8, 40), (40, 80)))
    Image.fromarray(wide).save(tmp_path / "wide.png")
    prompts[0] = replace(prompts[0], images=(str(tmp_path / "wide.png"),))
    prompts[2] = replace(prompts[2], images=(str(tmp_path / "wide.png"), narrow))
    evaluation.write_samples(tmp_path / "000000", found, prompts, {"iteration": 0})
    items = json.loads((tmp_path / "000000/samples.json").read_text())["items"]
    assert [item.get("condition") for item in items] == [
        "0000_condition.png",
        None,
        "0002_condition.png",
    ] and "images" not in items[1]
    assert items[2]["images"] == [str(tmp_path / "wide.png"), prompts[2].image_digests[1]]
    row = np.asarray(Image.open(tmp_path / "000000/0002_condition.png"))
    assert (
        row.shape == (16, 40 + 4 + 8, 3)
        and (row[:, :40] == 40).all()
        and (row[:, 40:44] == 255).all()
        and (row[:, 44:] == 80).all()
    )


@pytest.mark.parametrize(
    "images, failed, not_finite, allowed, words",
    [
        (4, 2, 0, 0.5, None),
        (4, 0, 0, 0.01, None),
        (4, 3, 0, 0.5, ["3 of 4 images of IT", "max_failed (0.5)", "last error: E"]),
        (4, 4, 4, 0.99, ["4 of 4", "diverged", "learning rate"]),
        (4, 3, 1, 0.5, ["1 of them", "diverged", "last error: E"]),
        (1, 1, 0, 0.999, ["1 of 1"]),
    ],
)
def test_when_too_many_have_failed(images, failed, not_finite, allowed, words):
    if words is None:
        return check_failed("IT", images, failed, not_finite, allowed, "E")
    with pytest.raises(TooManyFailed) as error:
        check_failed("IT", images, failed, not_finite, allowed, "E")
    assert all(word in str(error.value) for word in words) and error.value.model_broken == bool(
        not_finite
    )
    assert not_finite < failed or "last error" not in str(error.value)


# -------------------------------------------------------------------------------------------- means
def test_a_gain_is_measured_prompt_by_prompt():
    """Prompts differ much, the change is the same for each: sure, whatever the means' own errors;
    failures are in no pair."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 50)
    tuned = base + 0.5 + rng.normal(0, 0.1, 50)
    base[3], tuned[[5, 6]] = NAN, NAN
    gain = gain_of(base, tuned)
    both = np.isfinite(base) & np.isfinite(tuned)
    change = (tuned - base)[both]
    assert (gain.scored, gain.failed) == (47, 3) and gain.value == pytest.approx(change.mean())
    assert gain.stderr == pytest.approx(change.std(ddof=1) / 47**0.5) and is_sure(
        gain.value, gain.stderr
    )
    assert not is_sure(mean_of(tuned).value - mean_of(base).value, mean_of(base).stderr)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([], (None, None, 0, 0)),
        ([NAN], (None, None, 0, 1)),
        ([2.0], (2.0, None, 1, 0)),
        ([2.0, 2.0, INF], (2.0, 0.0, 2, 1)),
    ],
)
def test_means_of_little(values, expected):
    found = mean_of(np.array(values))
    assert (found.value, found.stderr, found.scored, found.failed) == expected
    assert not is_sure(0.0, 0.0)


# ----------------------------------------------------------------------------------------- training
SMALL = {
    "num_steps": 3,
    "plan": {"branch_steps": [0, 1], "seeds": 2, "children": 3},
    "lanes": 1,
    "decode_batch": 5,
}


def breaking(policy, monkeypatch, numbers):
    """Latents number `numbers`, in the order in which they are decoded, are NaN."""
    real, count = type(policy).pixels, itertools.count()

    def pixels(latents, size):
        latents = latents.clone()
        for row in range(len(latents)):
            if next(count) in numbers:
                latents[row, 0] = NAN
        return real(policy, latents, size)

    monkeypatch.setattr(policy, "pixels", pixels)


def test_a_rollout_masks_and_counts_them(policy, monkeypatch):
    config = small_config(rollout=SMALL)
    whole = Iteration(policy, config).scored
    breaking(policy, monkeypatch, {0, 4, 17})
    data = Iteration(policy, config).scored
    lost = np.isnan(data.rewards.total)
    assert data.failed == 3 and data.images == whole.images and 0 < lost.sum() <= 3
    assert (data.rewards.total[~lost] == whole.rewards.total[~lost]).all()
    for key, value in data.diversity.items():
        assert np.isfinite(value) and value == pytest.approx(whole.diversity[key], rel=0.5), (
            "of the images that are there"
        )


def test_a_rollout_of_nothing_stops_the_run(policy, monkeypatch):
    breaking(policy, monkeypatch, range(10**6))
    with pytest.raises(
        TooManyFailed,
        match=(
            r"28 of 28 images of this iteration could not be scored, .*max_failed \(0.5\).*diverged"
        ),
    ):
        Iteration(policy, small_config(rollout=SMALL))


@pytest.mark.parametrize(
    "training", [{}, {"penalty": {"type": "kl", "coef": 0.3}}], ids=["plain", "kl"]
)
def test_what_a_failed_child_holds_reaches_no_gradient(policy, training):
    """NaN in failed children, in a state all of whose children failed, and in the state that would
    serve as padding."""
    iteration = Iteration(policy, small_config(rollout={**SMALL, "lanes": None}, training=training))
    rewards = iteration.dense(iteration.rewards).copy()
    rewards[0, 0, 1, 2], rewards[0, 1, 0, :2], rewards[1, 1, 1], rewards[0, 0, 0] = (
        NAN,
        NAN,
        NAN,
        NAN,
    )
    rewards, gradients = rewards.ravel(), []
    for broken in (False, True):
        if broken:
            for n, s in enumerate(iteration.states):
                failed = np.isnan(rewards[s.slots])
                children, log_prob, x = s.children.clone(), s.log_prob.clone(), s.x.clone()
                children[failed], log_prob[failed] = INF, NAN
                x[:] = NAN if failed.all() else x
                iteration.states[n] = replace(s, x=x, children=children, log_prob=log_prob)
            assert not iteration.states[0].x.isfinite().any()
        runtime = PlainRuntime(policy, drift=0.05)
        part, updater = (
            iteration.part(iteration.advantages(rewards), 3, extra=1),
            iteration.updater(runtime),
        )
        for _ in range(2):
            metrics = updater.update(part, 1.0)
            assert all(
                np.isfinite(value)
                for key, value in metrics.items()
                if key not in ("broken", "skipped")
            )
        gradients.append(flat(runtime.gradient()))
    assert_close("gradient", gradients[1], gradients[0], 1e-5)


def test_padding_is_finite_even_where_no_state_is(policy):
    states = Iteration(policy, small_config(rollout=SMALL)).states[:2]
    broken = [replace(s, x=s.x * NAN) for s in states]
    assert padding_of([broken[0], states[1]]) is states[1]
    assert padding_of(broken).x.isfinite().all() and padding_of(broken).unit == states[0].unit


@pytest.mark.slow
def test_a_run_that_diverges_reports_no_gain(tmp_path):
    from tempflow.checkpoints import find

    run = train(
        tmp_path,
        "diverges",
        processes=None,
        status=2,
        rollout={"num_steps": 3, "plan": {"branch_steps": [0, 1]}},
        training={"iterations": 3},
        eval={"every": 1, "prompts": 4},
        checkpoint={"every": 1},
        deepspeed={"optimizer": {"type": "AdamW", "params": {"lr": 1e6, "torch_adam": True}}},
    )
    assert (
        "4 of 4 images of the evaluation at iteration 1" in run.done.stderr
        and "diverged" in run.done.stderr
    )
    assert "gain" not in run.done.stdout and not (run.folder / "summary.json").exists()
    base, last = run.rows
    assert base["eval/scored"] == 4 and base["eval/failed"] == 0 and "eval/gain" not in base
    assert last["iteration"] == 1 and not any(key.startswith("eval/") for key in last)
    assert find.best(run.folder, "eval/reward") is None
