"""AdamW with moments in 8 bit: a run's bits survive a checkpoint, its bytes are those of the dry
run, and what it learns is what AdamW learns, but for rounding."""

import sys

import pytest
import torch
from elastic_cases import ADAMW, Toy
from engine_cases import small_config

from tempflow import eight_bit
from tempflow.config.deepspeed import check_machine
from tempflow.errors import UserError
from tempflow.estimate import estimate
from tempflow.training import distributed

pytestmark = pytest.mark.cpu
PARAMS = {"lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.1}
OPTIMIZER = {"type": "AdamW8bit", "params": PARAMS}
# of elastic_cases.CASES: more of the section, elements of a parameter group. In bf16 with sums in
# fp32 DeepSpeed has a wrapper of its own.
CASES = {
    "full-zero0": ({}, 1_200_000),
    "full-zero2": ({}, 1_200_000),
    "full-zero3": ({}, 1_200_000),
    "bf16-zero1": ({"data_types": {"grad_accum_dtype": "fp32"}}, 20_000),
}


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    pytest.importorskip("bitsandbytes")
    distributed.init_distributed()


def moments(toy: Toy) -> list[dict]:
    base = getattr(toy.runtime.engine.optimizer, "optimizer", toy.runtime.engine.optimizer)
    return list(base.state.values())


def held_bytes(toy: Toy) -> int:
    """Of all state tensors; the tables of 8-bit values, 2 kB a run, are left out."""
    return sum(
        t.numel() * t.element_size()
        for state in moments(toy)
        for name, t in state.items()
        if torch.is_tensor(t) and not name.startswith("qmap")
    )


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, monkeypatch, case):
    """To the bit: weights, moments and gradient norms; in several groups of parameters, as where
    all of them together are too long for bitsandbytes."""
    section, longest = CASES[case]
    monkeypatch.setattr(eight_bit, "LONGEST", longest)
    first, second = (Toy(case, optimizer=OPTIMIZER, **section) for _ in range(2))
    assert len(first.runtime.engine.optimizer.param_groups) > 1
    first.train(range(2))
    saved = first.save(tmp_path, 2)
    assert any(state["state1"].dtype == torch.uint8 for state in moments(first))
    norms, end = first.train(range(2, 4)), first.held()
    first.close()

    second.restore(tmp_path)
    assert same(second.held(), saved)
    assert torch.equal(second.train(range(2, 4)), norms) and same(second.held(), end)
    second.close()


@pytest.mark.parametrize("stage", [0, 2])
def test_it_learns_what_adamw_learns(stage):
    """The weights' way in three updates is AdamW's but for some percent, and the state is as large
    as the dry run says."""
    toy = Toy(f"full-zero{stage}", optimizer=OPTIMIZER)
    plain = Toy(f"full-zero{stage}", optimizer={**ADAMW, "params": {**PARAMS, "torch_adam": True}})
    before = toy.held()
    toy.train(range(3)), plain.train(range(3))
    ours, theirs = toy.held(), plain.held()
    names = [name for name in ours if ":" not in name]
    moved = torch.cat([(theirs[name] - before[name]).flatten() for name in names])
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in names])
    assert 0 < apart.norm() / moved.norm() < 0.1

    seen = estimate(
        small_config(deepspeed={"optimizer": OPTIMIZER, "zero_optimization": {"stage": stage}})
    )
    (item,) = (i for i in seen.memory.resident if i.name == "training engine: optimizer")
    masters = 4 * seen.trained if stage else 0
    assert item.bytes == pytest.approx(masters + held_bytes(toy), rel=1e-4)
    toy.close(), plain.close()


def test_an_update_that_is_not_finite_leaves_the_moments():
    toy = Toy("full-zero2", optimizer=OPTIMIZER)
    toy.train(range(1))
    before, weights = [dict(s) for s in moments(toy)], toy.held()
    kept = [{k: v.clone() for k, v in s.items() if torch.is_tensor(v)} for s in before]
    toy.runtime.accumulate(
        sum(p.square().sum() for p in toy.runtime.module.parameters()) * torch.nan, last=True
    )
    assert toy.runtime.step(1.0) is None
    for state, was, tensors in zip(moments(toy), before, kept, strict=True):
        assert state["step"] == was["step"] and same(
            {k: v for k, v in state.items() if torch.is_tensor(v)}, tensors
        )
    assert all(torch.equal(toy.held()[name], weights[name]) for name in weights)
    toy.close()


def test_without_the_library_the_start_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"^deepspeed.optimizer.type: AdamW8bit .*pip install"):
        check_machine({"optimizer": OPTIMIZER})
    check_machine({"optimizer": ADAMW})
