"""Advantages by place: by hand, against the loss of whole children, and against autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_cases import dense_slots
from kernel_cases import assert_close
from test_objectives import SHAPE, B, N, batch_of, gradient, old_of, velocities

from tempflow.advantages.group import Group
from tempflow.advantages.spatial import Spatial
from tempflow.config import parse_config
from tempflow.errors import UserError
from tempflow.media import frame_places
from tempflow.objectives.grpo import Grpo
from tempflow.objectives.trust_region import Dppo, Hinge, Spo
from tempflow.penalties import Kl
from tempflow.rewards import RewardSpec, without_maps
from tempflow.rewards.base import BadScores, Scores, as_scores
from tempflow.run.diversity import FRAMES, mean_colors, thumbnails
from tempflow.training.batches import _over_latents
from tempflow.training.reward_maps import latent_grid, summed
from tempflow.training.start import _few_for_colors
from tempflow.types import Rewards, Size

NAN = float("nan")


def spatial(maps, total=None, colors=None, **options):
    """maps: [P, S, K, B, rows, columns]; colors: [P, S, K, B, 3]."""
    maps = np.asarray(maps, dtype=np.float64)
    slots = dense_slots(maps.shape[:4])
    flat = maps.reshape(len(slots), *maps.shape[4:])
    total = flat.mean((1, 2)) if total is None else np.ravel(total)
    colors = None if colors is None else np.reshape(colors, (len(slots), 3))
    return Spatial(**options)(slots, Rewards(total, {}, {}, {}, maps=flat, colors=colors))


# ---------------------------------------------------------------------------------------- advantage
def test_by_hand():
    # Places [4, 0] and [2, 0]: distances from the mean of 1 and -1 at the first place.
    found = spatial([[[[[[4.0, 0.0]], [[2.0, 0.0]]]]]])
    scale = np.sqrt(0.5) + 1e-4
    np.testing.assert_allclose(found.maps, [[[1 / scale, 0]], [[-1 / scale, 0]]], rtol=1e-6)
    assert found.maps.dtype == np.float32
    np.testing.assert_allclose(found.values, np.array([1, -1]) / (1 + 1e-4 / 0.5 * 0.5), rtol=2e-4)


def test_a_failed_child_is_left_out():
    maps = np.array([[[[[[4.0, 0.0]], [[2.0, 0.0]], [[9.0, NAN]]]]]])
    found = spatial(maps, total=[2.0, 1.0, NAN])
    assert found.valid.tolist() == [True, True, False]
    np.testing.assert_array_equal(found.maps[:2], spatial(maps[:, :, :, :2]).maps)
    assert (found.maps[2] == 0).all()
    assert (spatial(np.full((1, 1, 1, 2, 1, 1), NAN)).maps == 0).all()


def test_groups_that_differ_more_count_more():
    maps = np.array([[[[[[1.0]], [[-1.0]]], [[[0.1]], [[-0.1]]]]]])
    large, _, small, _ = np.abs(spatial(maps).maps).ravel()
    assert large == pytest.approx(10 * small)
    assert np.abs(spatial(100 * maps, clip=0.5).maps).max() == 0.5


def test_maps_that_are_even_are_the_whole_images():
    rng = np.random.default_rng(0)
    total = rng.normal(size=(3, 2, 1, 4))
    maps = np.broadcast_to(total[..., None, None], (*total.shape, 2, 3))
    found, slots = spatial(maps, over="prompt"), dense_slots(total.shape)
    whole = Group(over="prompt", scale="none")(slots, Rewards(total.ravel(), {}, {}, {})).values
    expected = whole / np.sqrt((whole**2).mean())
    np.testing.assert_allclose(
        found.maps, np.broadcast_to(expected[:, None, None], found.maps.shape), rtol=1e-3
    )


# ----------------------------------------------------------------------------------- blind to color
def colored(states=40, seed=0):
    """(maps, colors) [P, 1, 1, 4, ...] without a relation between them."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(states, 1, 1, 4, 2, 3))
    group = rng.uniform(0.4, 0.9, size=(states, 1, 1, 1, 3))
    return maps, group + 0.02 * rng.normal(size=(states, 1, 1, 4, 3))


def related(found, colors):
    """The slopes of the advantages, images' means, in three colors and three interactions."""
    away = colors - colors.mean(3, keepdims=True)
    group = colors - away
    features = np.concatenate([away, away * (group - group.mean((0, 1, 2, 3)))], -1).reshape(-1, 6)
    return np.linalg.lstsq(
        features / features.std(0), found.maps.mean((1, 2), dtype=np.float64), rcond=None
    )[0]


def test_no_color_is_preferred():
    """Not a darker one, nor one that is nearer to the mean of all."""
    maps, colors = colored()
    away = colors - colors.mean(3, keepdims=True)
    darker = -30 * away[..., 1]
    nearer = -200 * (away * (colors - 0.65)).sum(-1)
    for preference in (darker, nearer):
        wanted = maps + preference[..., None, None]
        assert np.abs(related(spatial(wanted), colors)).max() > 0.05
        assert np.abs(related(spatial(wanted, colors=colors, clip=50.0), colors)).max() < 1e-4
    # The same advantages whatever the preference: only the common scale is left to differ.
    one, other = (
        spatial(maps + p[..., None, None], colors=colors, clip=50.0).maps
        for p in (0 * darker, darker)
    )
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_places_differ_as_before():
    maps, colors = colored()
    with_color = maps - 30 * (colors - colors.mean(3, keepdims=True))[..., :1, None]
    found = spatial(with_color, colors=colors, clip=50.0).maps
    plain = spatial(with_color, clip=50.0).maps
    across = [m - m.mean((1, 2), keepdims=True) for m in (found, plain)]
    ratio = across[0].std() / across[1].std()
    np.testing.assert_allclose(across[0], ratio * across[1], atol=1e-5)


def test_colors_that_do_not_differ_explain_nothing():
    maps, colors = colored()
    plain = spatial(maps)
    for same in (np.full_like(colors, 0.3), 0.3 + 1e-15 * colors):
        np.testing.assert_allclose(spatial(maps, colors=same).maps, plain.maps, atol=1e-4)
    gray = np.repeat(colors[..., :1], 3, -1)  # columns that depend on each other
    assert np.isfinite(spatial(maps, colors=gray).maps).all()


def test_a_missing_images_color_counts_for_nothing():
    maps, colors = colored()
    total = maps.mean((4, 5))
    total[3, 0, 0, 1] = NAN
    masked, gone = maps.copy(), colors.copy()
    masked[3, 0, 0, 1], gone[3, 0, 0, 1] = NAN, NAN
    strange = np.where(np.isnan(gone), 7.0, gone)
    found = spatial(masked, total, gone)
    np.testing.assert_array_equal(found.maps, spatial(masked, total, strange).maps)
    assert np.isfinite(found.maps).all() and (found.maps.reshape(40, 4, -1)[3, 1] == 0).all()
    assert np.isfinite(spatial(masked, total * NAN, colors).maps).all()


@pytest.mark.parametrize("shape, frames", [((5, 32, 96, 3), 1), ((2, 9, 64, 20, 3), 9)])
def test_mean_colors_are_those_of_the_images(shape, frames):
    # Sides that 32 divides, or that are below 32: then the averages of averages are the average.
    media = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    size = Size(shape[-3], shape[-2], frames)
    found = mean_colors(thumbnails(media), size)
    shown = media[:, None] if frames == 1 else media[:, frame_places(frames, FRAMES)]
    np.testing.assert_allclose(found, shown.mean((1, 2, 3)) / 255, atol=1e-6)


def test_too_few_images_for_a_fit_are_told():
    blind = {"type": "spatial", "blind_to": "color"}
    plan = {"seeds": 1, "children": 4, "branch_steps": [0, 1]}
    # 4 x 2 x (4 - 1) = 24 is just enough.
    assert _few_for_colors(config({"plan": plan}, prompts=4, advantage=blind)) is None
    told = _few_for_colors(config({"plan": plan}, prompts=3, advantage=blind))
    assert "blind_to: an iteration has 24 images in 6 groups, too few" in told
    maps, colors = colored(states=8)
    plain = [spatial(maps[:n]).maps for n in (7, 8)]
    for n, same in ((7, True), (8, False)):
        found = spatial(maps[:n], colors=colors[:n]).maps
        assert np.array_equal(found, plain[n - 7]) is same
    with pytest.raises(UserError, match="advantage.blind_to: expected 'color' or null"):
        config(advantage=blind | {"blind_to": "hue"})


# --------------------------------------------------------------------------------------------- loss
OBJECTIVES = [
    Grpo(3e-4, 5e-4), Dppo(1e-4), Hinge(1e-3), Spo(1e-3), Spo(1e-3, asymmetric=True)
]  # fmt: skip


def mapped(batch, seed=3):
    """Every place of [3, 7] latents has an advantage of its own."""
    g = torch.Generator().manual_seed(seed)
    return replace(batch, maps=torch.randn(N, B, 3, 1, generator=g) * batch.valid[..., None, None])


@pytest.mark.parametrize("penalty", [None, Kl(0.3)], ids=["none", "kl"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: type(one).__name__)
def test_even_maps_have_the_whole_images_gradient(objective, first, penalty):
    batch = batch_of()
    even = replace(batch, maps=batch.advantage[..., None, None].expand(N, B, 3, 1))
    new, before = velocities(apart=0.02)
    old = None if first else old_of(objective, batch, before)
    one, loss, seen = gradient(objective, batch, new, old, penalty, before)
    other, also, local = gradient(objective, even, new, old, penalty, before)
    assert_close("gradient", other, one, 1e-5)
    assert_close("kl", local.kl, seen.kl, 1e-6, scale=1.0)
    assert float(local.clip_fraction) == float(seen.clip_fraction)
    assert not first or abs(float(loss - also)) < 1e-5


def test_a_places_gradient_is_that_of_its_advantage():
    """Against autograd through each element's log-density; masked children have no part."""
    valid = torch.ones(N, B, dtype=torch.bool)
    valid[1, 2] = False
    batch = mapped(batch_of(valid=valid))
    new, _ = velocities()
    found, loss, _ = gradient(Grpo(), batch, new, None)
    v = new.clone().requires_grad_(True)
    one = (slice(None), None, None)
    center = batch.a[one] * batch.x + batch.b[one] * v
    apart = torch.where(valid[..., None, None], batch.children - center[:, None], 0.0)
    log_density = -(apart**2) / (2 * batch.tau[:, None, None, None] ** 2)
    each = (batch.maps * log_density).mean((1, 2, 3))
    (-(batch.weight * each).mean()).backward()
    assert_close("gradient", found, v.grad, 1e-5)
    assert_close("loss", loss.detach(), -(batch.weight * batch.maps.mean((1, 2, 3))).mean(), 1e-5)


def test_a_place_without_advantage_has_no_gradient():
    batch = mapped(batch_of())
    batch.maps[:, :, 1] = 0.0
    found, *_ = gradient(Grpo(), batch, velocities()[0], None)
    assert (found[:, 1] == 0).all() and (found[:4, 0] != 0).all() and SHAPE[0] == 3


# -------------------------------------------------------------------------------- rewards and grids
def test_maps_are_summed_on_the_latents_grid():
    specs = [RewardSpec("a", 2.0, {}), RewardSpec("b", 10.0, {})]
    quarters = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    scores = {
        "a": Scores(np.float32([1, 1]), maps=quarters),
        "b": Scores(np.float32([0.1, NAN]), applies=np.array([True, False])),
    }
    found = summed(scores, specs, (2, 4))
    np.testing.assert_allclose(found[0], [[1, 1, 3, 3], [5, 5, 7, 7]])
    np.testing.assert_allclose(found[1], [[8, 8, 10, 10], [12, 12, 14, 14]])
    np.testing.assert_allclose(summed(scores, specs, (1, 1))[:, 0, 0], [4, 11])
    scores["a"].values[0] = NAN
    assert np.isnan(summed(scores, specs, (2, 4))[0]).all()


@pytest.mark.parametrize(
    "shape, size, grid",
    [
        ((48, 32), Size(32, 96), (4, 12)),
        ((4096, 64), Size(1024, 1024), (64, 64)),
        ((16, 60, 104), Size(480, 832), (60, 104)),
        ((16, 5, 60, 104), Size(480, 832, 17), (60, 104)),
    ],
)
def test_grids(shape, size, grid):
    assert latent_grid(shape, size) == grid
    maps, latent = torch.rand(3, 2, *grid), torch.zeros(shape)
    over = _over_latents(maps, latent)
    whole = over.expand(3, 2, *shape)  # broadcasts
    picture = whole[..., 0].unflatten(2, grid) if len(shape) == 2 else whole.flatten(2, -3)[:, :, 0]
    assert torch.equal(picture, maps)


def test_scores_with_maps():
    maps = np.zeros((2, 1, 3))
    maps[1, 0, 2] = np.inf
    found = as_scores(Scores(np.ones(2), maps=maps), 2)
    assert np.isnan(found.values).tolist() == [False, True] and found.maps.dtype == np.float32
    for wrong in (np.zeros((2, 3)), np.zeros((1, 1, 3)), np.zeros((2, 0, 3))):
        with pytest.raises(BadScores, match=r"maps of shape .* expected \[2, h, w\]"):
            as_scores(Scores(np.ones(2), maps=wrong), 2)


# ----------------------------------------------------------------------------------------- refusals
def config(rollout=None, prompts=8, **training):
    return parse_config(
        {
            "model": {"path": "model"},
            "data": {"train": "words.txt", "prompts_per_iteration": prompts},
            "rollout": rollout or {},
            "rewards": {"ocr": {"detect": False}},
            "training": {"advantage": "spatial", **training},
            "deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
        }
    )


def test_objectives_that_cannot_use_it_are_refused():
    assert config().training.advantage == {
        "type": "spatial", "over": "seed", "clip": 5.0, "blind_to": None
    }  # fmt: skip
    for objective in ("dpo", {"type": "grpo", "ratio": "guard"}, "nft"):
        with pytest.raises(UserError, match="training.advantage: spatial gives each place"):
            config(objective=objective)


def test_rewards_without_maps_are_told():
    assert without_maps([RewardSpec("jpeg", 1.0, {}), RewardSpec("ocr", 1.0, {})]) is None
    told = without_maps([RewardSpec("jpeg", 1.0, {}), RewardSpec("ocr", 0.0, {})])
    assert told.startswith("training.advantage: 'jpeg' does not say what the places")
