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
from tempflow.objectives.grpo import Grpo
from tempflow.objectives.trust_region import Dppo, Hinge, Spo
from tempflow.penalties import Kl
from tempflow.rewards import RewardSpec, without_maps
from tempflow.rewards.base import BadScores, Scores, as_scores
from tempflow.training.batches import _over_latents
from tempflow.training.reward_maps import latent_grid, summed
from tempflow.types import Rewards, Size

NAN = float("nan")


def spatial(maps, total=None, **options):
    """maps: [P, S, K, B, rows, columns]."""
    maps = np.asarray(maps, dtype=np.float64)
    slots = dense_slots(maps.shape[:4])
    flat = maps.reshape(len(slots), *maps.shape[4:])
    total = flat.mean((1, 2)) if total is None else np.ravel(total)
    return Spatial(**options)(slots, Rewards(total, {}, {}, {}, maps=flat))


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
def config(**training):
    return parse_config(
        {
            "model": {"path": "model"},
            "data": {"train": "words.txt"},
            "rewards": {"ocr": {"detect": False}},
            "training": {"advantage": "spatial", **training},
            "deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
        }
    )


def test_objectives_that_cannot_use_it_are_refused():
    assert config().training.advantage == {"type": "spatial", "over": "seed", "clip": 5.0}
    for objective in ("dpo", {"type": "grpo", "ratio": "guard"}, "nft"):
        with pytest.raises(UserError, match="training.advantage: spatial gives each place"):
            config(objective=objective)


def test_rewards_without_maps_are_told():
    assert without_maps([RewardSpec("jpeg", 1.0, {}), RewardSpec("ocr", 1.0, {})]) is None
    told = without_maps([RewardSpec("jpeg", 1.0, {}), RewardSpec("ocr", 0.0, {})])
    assert told.startswith("training.advantage: 'jpeg' does not say what the places")
