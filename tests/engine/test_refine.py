"""engine/refine.py: rows that begin at a given latent, a search whose best never falls, best of n
as its zero rounds, and the files."""

import json

import numpy as np
import pytest
import torch
from engine_cases import ROOT, examples, small_config, write_config
from PIL import Image
from rollout_cases import GRID, SHAPE, Units, toy_velocity
from run_cases import script_here

from tempflow.config import Suffix
from tempflow.models.embeddings import EmbeddingCache
from tempflow.models.opened import Opened
from tempflow.run import evaluation
from tempflow.run.refining import Incumbents, Search, refine
from tempflow.sampling.layout import Forest
from tempflow.sampling.noise import Noise
from tempflow.sampling.scheduler import integrate
from tempflow.sampling.steps import Grid, ode_coefficients
from tempflow.sampling.suffix import count_forwards
from tempflow.types import Row, Unit

TEXTS = ['the word "ABC"', 'the word "FLOW"', 'the word "Q"']


# ---------------------------------------------------------------------- rows that begin at a latent
@pytest.mark.parametrize("suffix", [None, Suffix(stride=2, order=1)], ids=["exact", "coarse"])
def test_a_row_begins_at_its_latent(suffix):
    """Two of them at different steps, beside one from initial noise: Euler's steps from there
    on."""
    units = [Unit(n, n, n, 0) for n in range(3)]
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    rows = [Row(units[0], 3), Row(units[1]), Row(units[2], 6)]
    forest, finished = Forest(rows, [0, 1, 2], {}), {}
    denoise = Units(toy_velocity, units, SHAPE)
    noise, grid = Noise(0, 0), Grid(GRID, ode_coefficients(GRID))
    for arrived in integrate(
        forest,
        denoise,
        grid,
        noise,
        micro_batch=2,
        suffix=suffix,
        given={0: latents[0], 2: latents[2]},
    ):
        finished |= dict(zip(arrived.rows, arrived.latents if arrived.rows else []))
        stats = arrived.stats
    paths = (
        {0: [3, 4, 6, 8, 10], 2: [6, 8, 10]}
        if suffix
        else {0: list(range(3, 11)), 2: list(range(6, 11))}
    )
    for n, path in paths.items():
        x = latents[n]
        for k, goal in zip(path, path[1:]):
            x = x + (GRID[goal] - GRID[k]) * toy_velocity(x[None], GRID[k : k + 1], [units[n]])[0]
        torch.testing.assert_close(finished[n], x, rtol=1e-6, atol=1e-6)
    assert (
        stats.forwards
        == count_forwards(rows, 10, suffix)
        == sum(len(p) - 1 for p in paths.values()) + (5 if suffix else 10)
    )


# --------------------------------------------------------------------------------------- the search
@pytest.fixture(scope="module")
def model(policy):
    rollout = {
        "height": 32,
        "width": 32,
        "num_steps": 5,
        "micro_batch": 4,
        "decode_batch": 3,
        "plan": {"branch_steps": "all"},
    }
    return Opened(small_config(rollout=rollout), policy, EmbeddingCache(policy))


class Distance:
    """Decodes nothing; the reward of a latent is its negative squared distance to a point."""

    def __init__(self):
        self.seen: list[tuple[int, float]] = []

    def __call__(self, places, latents):
        rewards = -(latents - 0.3).square().flatten(1).mean(1).double().numpy()
        self.seen += list(zip(places, rewards.tolist()))
        return lambda: (latents.numpy(), rewards)


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "noise"])
def test_the_best_never_falls(model, branch):
    """It is the best of all that was scored, its latent is what is refined on, and the search finds
    better ones."""
    judge, prompts, search = Distance(), examples(TEXTS), Search(4, 3, (3, 1), branch)
    told = []
    rounds = list(
        refine(
            model,
            prompts,
            judge,
            search,
            seed=5,
            first=lambda images, rewards: told.append(rewards),
        )
    )
    assert [r.number for r in rounds] == [0, 1, 2, 3, 4] and [r.step for r in rounds] == [
        None,
        3,
        2,
        2,
        1,
    ]
    rewards = np.stack([*told, *(r.rewards for r in rounds)])
    assert (np.diff(rewards, axis=0) >= 0).all() and rewards[-1].mean() > rewards[1].mean()
    for n in range(len(prompts)):
        assert rewards[-1, n] == max(reward for place, reward in judge.seen if place == n)
        assert rewards[-1, n] == pytest.approx(
            -np.square(rounds[-1].images[n] - 0.3).mean(), rel=1e-5
        )
    assert all((r.drawn == 3 * (r.number + 1)).all() for r in rounds)
    # the last 2 of 5 steps; those that branch off share their first forward
    first = 3 * (2 + 2 * 1) if branch else 3 * 3 * 2
    assert rounds[0].forwards == 3 * 3 * 5 and rounds[1].forwards == 3 * 3 * 5 + first
    again = list(refine(model, prompts, Distance(), search, seed=5))
    assert all((a.rewards == b.rewards).all() for a, b in zip(rounds, again))


def test_no_rounds_are_the_best_of_n(model):
    """Bit for bit the best of what n seeds are drawn to."""
    prompts, judge = examples(TEXTS), Distance()
    (only,) = refine(model, prompts, judge, Search(0, 4), seed=7)
    drawn, n = [], len(prompts)
    for seed in range(7, 11):
        parts = evaluation.final_latents(model, prompts, list(range(n)), seed=seed)
        drawn.append(torch.cat([latents for _, latents in parts]))
    drawn = torch.stack(drawn)
    best = (-(drawn - 0.3).square().flatten(2).mean(2)).argmax(0)
    assert len(set(best.tolist())) > 1, "the seeds differ in what they are best at"
    assert all(np.array_equal(only.images[p], drawn[best[p], p].numpy()) for p in range(n))


def test_the_first_images_are_those_of_the_sample_command(model):
    """All candidates of round 0, to the last bit of each pixel."""
    prompts, seen = examples(TEXTS), {n: [] for n in range(3)}

    def judge(places, latents):
        images, _ = model.eval_sampler().decode(latents)
        for place, image in zip(places, images, strict=True):
            seen[place].append(image)
        return lambda: (images, np.zeros(len(places)))

    told = []
    list(
        refine(
            model,
            prompts,
            judge,
            Search(0, 2),
            seed=7,
            first=lambda images, rewards: told.extend(images),
        )
    )
    for j in range(2):
        drawn = [
            image
            for _, images, _ in evaluation.draw(model, prompts, [0, 1, 2], seed=7 + j)
            for image in images
        ]
        assert all(np.array_equal(seen[n][j], drawn[n]) for n in range(3))
    assert all(np.array_equal(told[n], seen[n][0]) for n in range(3))


def test_a_prompt_at_its_target_is_left_alone(model):
    prompts = examples(TEXTS)
    (start,) = refine(model, prompts, Distance(), Search(0, 2))
    target = float(np.sort(start.rewards)[-1])
    rounds = list(refine(model, prompts, Distance(), Search(2, 2, (2, 2), target=target)))
    done = int(start.rewards.argmax())
    assert rounds[-1].drawn[done] == 2 and (np.delete(rounds[1].drawn, done) == 4).all()
    assert len(list(refine(model, prompts, Distance(), Search(3, 2, (2, 2), target=-1e9)))) == 1


def test_a_failed_reward_never_wins():
    best = Incumbents(1)
    for name, reward in (
        ("a", np.nan),
        ("b", np.nan),
        ("c", -5.0),
        ("d", np.nan),
        ("e", -5.0),
        ("f", -4.0),
    ):
        best.consider(0, name, name, reward)
        assert best.images[0] == {"a": "a", "b": "a", "c": "c", "d": "c", "e": "c", "f": "f"}[name]


# -------------------------------------------------------------------------------------- the command
def test_files(tmp_path):
    config = write_config(
        tmp_path, rewards={"jpeg": 1.0}, rollout={"num_steps": 4, "plan": {"branch_steps": "all"}}
    )
    arguments = (
        "--config",
        config,
        "--prompt",
        "a cat",
        "--prompt",
        "two dogs",
        "--rounds",
        2,
        "--children",
        2,
        "--step",
        "2..1",
    )
    done = script_here("refine", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out/rewards.json").read_text())
    assert [r["step"] for r in found["rounds"]] == [None, 2, 1] and [
        r["images"] for r in found["rounds"]
    ] == [2, 4, 6]
    assert found["weights"] == "base" and [item["prompt"] for item in found["items"]] == [
        "a cat",
        "two dogs",
    ]
    means = [found["first"], *(r["reward"] for r in found["rounds"])]
    assert means == sorted(means) and f"{means[-1]:.3f} of the best of 6 images each" in done.stdout
    names = {
        "0000.png",
        "0000_best.png",
        "0001.png",
        "0001_best.png",
        "all.png",
        "rewards.json",
        "rewards.png",
    }
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    width, height = Image.open(tmp_path / "out/0000_best.png").size
    assert Image.open(tmp_path / "out/all.png").size == (4 * width + 3 * 4, 2 * height)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["--step", "6..9"],
            (
                "--step: expected steps from 0 to 8 (the last of the 10 steps takes no noise), got"
                " 6..9"
            ),
        ),
        (["--num-steps", "1"], "--rounds: got 8, but no step of a grid of 1 takes noise"),
        (["--step", "x"], "expected a whole number"),
        (["--rewards", "{"], "--rewards: expected JSON"),
        (["--rewards", '{"taste": 1.0}'], "taste"),
        (["--suffix", '{"stride": 0}'], "--suffix: stride"),
        (
            ["--suffix", '{"weights": "float8"}'],
            "--suffix: weights and audit_every apply to training only",
        ),
        (["--run", "runs/a"], "expected either --run or --config"),
        (["--base"], "they are not allowed with --config"),
        (["--children", "0"], "--children"),
        (["--target", "much"], "expected a number"),
        (["--set", "model.path=/nowhere"], "model.path"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, arguments, said):
    """Before the model is loaded, and nothing is written."""
    done = script_here(
        "refine", "--config", ROOT / "configs/tiny_ocr.json", *arguments, "--out", tmp_path / "out"
    )
    assert done.returncode == 2 and said in done.stderr and not list(tmp_path.iterdir()), (
        done.stderr
    )


def test_the_default_steps_follow_the_grid():
    from tempflow.commands.refine import chosen_steps, parse_args

    for num_steps, steps in ((10, (3, 1)), (40, (12, 4)), (4, (1, 0)), (2, (0, 0))):
        args = parse_args(["--config", "x", "--out", "y", "--num-steps", str(num_steps)])
        assert chosen_steps(args, small_config()) == steps
