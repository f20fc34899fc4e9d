"""Transformer blocks as ZeRO-3's units: in force for every family, with the update that DeepSpeed's
own units give."""

from functools import cache

import pytest
import torch
from engine_cases import small_config
from family_cases import FAMILIES
from run_cases import SGD

from tempflow.training import distributed, leaves
from tempflow.training import engine as runtime

OWN = {"leaf_module": {"classes": []}}  # what a user writes who wants DeepSpeed's own units
pytestmark = pytest.mark.usefixtures("small_condition_images")
SUMS = 1e-6  # fp32, relative: gradients of a block's inputs are added in another order


@pytest.fixture(scope="module")
def policies(family_folders):
    """Each family with its policy and folder, loaded once; a runtime leaves it alone."""
    from tempflow.models import load_policy

    distributed.init_distributed()
    return cache(
        lambda name: (
            FAMILIES[name],
            load_policy(str(family_folders(name)), max_sequence_length=20),
            family_folders(name),
        )
    )


def updated(family, lora, checkpointing, **zero):
    """The runtime after one update on two micro-batches, and its trained weights. family: with its
    policy and folder."""
    family, policy, folder = family
    size = family.size(32, 96)
    config = small_config(
        model={
            "path": str(folder),
            "lora": {"rank": 2, "alpha": 4.0} if lora else None,
            "gradient_checkpointing": checkpointing,
        },
        training={"penalty": {"coef": 0.1}},
        deepspeed={
            **SGD,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
        },
    )
    made = runtime.Runtime(config, policy)
    generator, text = torch.Generator().manual_seed(3), family.encoded(policy, size=size)
    for last in (False, True):
        x = torch.randn(2, *policy.latent_shape(size), generator=generator)
        goal = torch.randn(x.shape, generator=generator)
        v = policy.velocity(made.engine, x, torch.tensor([0.9, 0.4]), text, size, 1.0)
        made.accumulate((v - goal).square().mean(), last=last)
    made.step(1.0)
    return made, {name: made.full_fp32(p) for name, p in made.trainable.items()}


# The gradients of what all its blocks take, the time's embedding among it, come out 5e-8 to 2e-7
# apart.
SUMMED_IN_ANOTHER_ORDER = {"z_image"}


def block_count(policy):
    return sum(
        type(part).__name__ in policy.denoiser()._no_split_modules
        for part in policy.denoiser().modules()
    )


def leaf_count(module):
    return sum(getattr(part, "_z3_leaf", False) for part in module.modules())


@pytest.mark.parametrize(
    "name, lora, checkpointing",
    [
        *((name, i % 2 == 1, False) for i, name in enumerate(FAMILIES)),
        ("flux", True, True),
        ("z_image", True, False),
    ],
)
def test_an_update_in_whole_blocks_is_the_same(policies, monkeypatch, name, lora, checkpointing):
    """To the bit, or the order of sums, against DeepSpeed's own units with blocks called alike. The
    reference has the same units."""
    made, got = updated(policies(name), lora, checkpointing)
    assert leaf_count(made.module) == block_count(policies(name)[1])
    assert lora or leaf_count(made.reference.module) == leaf_count(made.module)

    def as_for_leaves(module, zero):
        leaves.call_by_position(module, leaves.leaf_section({"stage": 3}, module))
        for part in module.modules():
            part._z3_leaf = False

    monkeypatch.setattr(runtime, "call_by_position", as_for_leaves)
    alike, same = updated(policies(name), lora, checkpointing, **OWN)
    assert leaf_count(alike.module) == 0
    if name in SUMMED_IN_ANOTHER_ORDER:
        assert all((value - same[key]).norm() <= 1e-6 * value.norm() for key, value in got.items())
    else:
        assert all(torch.equal(value, same[key]) for key, value in got.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_run_once_a_block_and_gradients_stay(policies, monkeypatch, checkpointing):
    """Also where blocks are computed again. Against blocks called by keyword, as diffusers does,
    the update is the same but for the order of sums."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    seen, real = [], DeepSpeedZeRoOffload.pre_sub_module_forward_function
    monkeypatch.setattr(
        DeepSpeedZeRoOffload,
        "pre_sub_module_forward_function",
        lambda self, module: (seen.append(type(module).__name__), real(self, module))[1],
    )
    _, got = updated(policies("flux"), False, checkpointing)
    blocks = [name for name in seen if "TransformerBlock" in name]
    assert len(blocks) == 2 * block_count(policies("flux")[1]) and "FluxAttention" not in seen
    outside, seen[:] = len(seen) - len(blocks), []
    _, plain = updated(policies("flux"), False, checkpointing, **OWN)
    assert "FluxAttention" in seen and len(seen) - outside > 10 * len(blocks)
    for name, value in got.items():
        assert (value - plain[name]).norm() <= SUMS * plain[name].norm(), name


def test_what_needs_no_gradient_stays_as_it_is_called():
    class Block(torch.nn.Module):
        def forward(self, x, time, table=None, scale=1.0, *, more=None):
            return x * time * table[0] * scale * more

    x, time, table = torch.ones(2), torch.ones(2, requires_grad=True), (torch.ones(2),)
    given = {"x": x, "time": time, "table": table, "more": 2.0}
    args, kwargs = leaves._by_position(Block(), (), dict(given))
    assert args[0] is x and args[1] is time and len(args) == 2
    assert kwargs == {"table": table, "scale": 1.0, "more": 2.0}
    args, _ = leaves._by_position(Block(), (), given | {"time": torch.ones(2)})
    assert len(args) == 1 and args[0].requires_grad
    with torch.no_grad():
        args, kwargs = leaves._by_position(Block(), (), given | {"time": torch.ones(2)})
    assert len(args) == 4 and kwargs == {"more": 2.0}


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize(
    "needing", ["a position", "a tuple", "a keyword", "a position, a tuple", "nothing"]
)
def test_checkpointed_blocks_have_all_their_gradients(leaf, needing):
    """Wherever in a block's arguments the gradients go, to the bit those of the plain block; the
    hooks of a leaf run once, its forward twice."""
    from deepspeed.utils import set_z3_leaf_module

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.calls = torch.nn.Parameter(torch.tensor([2.0, -3.0])), 0

        def forward(self, x, pair, more):
            self.calls += 1
            return (x * pair[0]).sin() * self.weight, (self.weight * more).exp()

    block, hooks = Block(), []
    if leaf:
        set_z3_leaf_module(block, True)
    block.register_forward_pre_hook(lambda *_: hooks.append(1))
    # By keyword, as `_by_position` passes what it need not show to DeepSpeed.
    block.register_forward_pre_hook(
        lambda module, args, _: (args[:2], {"more": args[2]}), with_kwargs=True
    )
    found = []
    for call in (block, leaves.checkpoint_block):
        block.zero_grad()
        values = {
            name: torch.tensor([0.3, 0.7], requires_grad=name in needing)
            for name in ("a position", "a tuple", "a keyword")
        }
        x, first, more = values.values()
        args = (x, (first, None), more)
        a, b = call(*args) if call is block else call(block, *args)
        (a + b).sum().backward()
        found.append([block.weight.grad, *(value.grad for value in values.values())])
    assert block.calls == 3 and "forward" not in vars(block)
    assert len(hooks) == (2 if leaf else 3)
    assert all(
        torch.equal(one, two) if one is not None else two is None
        for one, two in zip(*found, strict=True)
    )


@pytest.mark.parametrize(
    "zero", [{"stage": 2}, {"stage": 3, "leaf_module": {"names": ["proj_out"]}}]
)
def test_other_stages_and_a_users_own_leaves_stay(zero):
    module = torch.nn.Linear(2, 2)
    module._no_split_modules = ["Linear"]
    assert leaves.leaf_section(zero, module) == zero
    checkpointed = leaves.leaf_section({"stage": 3}, module, checkpointing=True)
    assert checkpointed["memory_efficient_linear"] is False
    own = {"stage": 3, "memory_efficient_linear": True}
    assert leaves.leaf_section(own, module, checkpointing=True)["memory_efficient_linear"] is True
    assert leaves.leaf_section({"stage": 3}, module)["leaf_module"] == {"classes": ["Linear"]}
