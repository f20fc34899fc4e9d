"""Compiled blocks of a rollout copy that shares the engine's base: velocities, reference and
updates are those without.

The blocks go through the tracer of torch.compile, which is where sharing could go wrong;
the code generator behind it takes a C++ compiler minutes.
"""

import pytest
import torch
from kernel_cases import assert_close
from test_shared_base import LORA, Trained, assert_one_base, config_of

from tempflow import compat
from tempflow.training import engine

pytestmark = pytest.mark.cpu
ROUNDING = 1e-5  # fp32, relative; of two updates with Adam's signs at a learning rate of 1e-2


@torch.no_grad()
def velocities(trained):
    """Of the rollout copy and the reference, which is the engine with its adapters off."""
    with trained.runtime.reference_transformer() as reference:
        return trained.velocity(trained.copy), trained.velocity(reference)


def test_a_shared_base_is_compiled(monkeypatch):
    real, compiled = compat.compile_repeated_blocks, []

    def traced(module, mode):
        compiled.append(module)
        real(module, backend="eager")

    monkeypatch.setattr(engine, "compile_repeated_blocks", traced)
    found = {}
    for how in ("eager", "compile"):
        config = config_of(
            1,
            lora={**LORA, "targets": ["attn.to_q"]},  # tracing adapters is what takes time
            rollout={"compile": how},
            training={"compile": how, "penalty": {"coef": 0.1}},
        )
        trained = Trained(config)
        assert_one_base(trained)
        trained.update()
        trained.runtime.refresh(trained.copy)
        assert_one_base(trained)
        weights = [trained.runtime.full_fp32(p) for p in trained.runtime.trainable.values()]
        found[how] = [*velocities(trained), *weights]
    assert compiled == [trained.runtime.module, trained.copy], "both, and in the second run alone"
    for n, (mine, plain) in enumerate(zip(found["compile"], found["eager"], strict=True)):
        assert_close(f"tensor {n}", mine, plain, ROUNDING)
    copy, base = found["compile"][:2]
    assert (copy - base).norm() > 1e-2 * base.norm(), "the adapters matter, and to the copy"
