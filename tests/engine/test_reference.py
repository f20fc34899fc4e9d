"""The reference policy and the average are the same wherever their weights are, and no rank holds
the whole of either."""

import pytest
import torch
from engine_cases import MODEL, examples, small_config
from run_cases import ADAMW, timeless, train
from safetensors.torch import load_file

from tempflow.checkpoints.safetensors_writer import write_safetensors
from tempflow.training import distributed
from tempflow.training.averaged import assign_owners
from tempflow.training.ema import Average
from tempflow.training.reference_policy import placement
from tempflow.types import Size

pytestmark = pytest.mark.cpu  # two ranks on any machine, compared to the last bit
SIZE = Size(32, 96)


# ------------------------------------------------------------------------------------------- pieces
def tensors():
    return {
        "a.weight": torch.randn(3, 5).t(),
        "b": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "ü": torch.randn(7),
    }


def test_a_streamed_file_is_a_safetensors_file(tmp_path):
    values = tensors()
    write_safetensors(
        tmp_path / "file",
        {name: tuple(t.shape) for name, t in values.items()},
        iter(values.items()),
    )
    read = load_file(tmp_path / "file")
    assert read.keys() == values.keys() and all(
        torch.equal(read[name], values[name]) for name in values
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values[:-1],
        lambda values: values[::-1],
        lambda values: [*values, ("more", torch.zeros(1))],
        lambda values: [(name, t.double()) for name, t in values],
        lambda values: [(name, t[None]) for name, t in values],
    ],
    ids=["missing", "order", "more", "dtype", "shape"],
)
def test_a_streamed_file_holds_what_was_announced(tmp_path, change):
    values = tensors()
    with pytest.raises(ValueError, match="file: "):
        write_safetensors(
            tmp_path / "file",
            {name: tuple(t.shape) for name, t in values.items()},
            change(list(values.items())),
        )


def test_weights_are_dealt_evenly():
    shapes = {
        f"block.{i}.{name}": shape
        for i in range(19)
        for name, shape in (("w", (64, 64)), ("b", (64,)), ("up", (64, 256)))
    }
    for ranks in (1, 2, 8):
        owner, held = assign_owners(shapes, ranks), [0] * ranks
        for name, rank in owner.items():
            held[rank] += torch.Size(shapes[name]).numel()
        assert owner.keys() == shapes.keys() and max(held) - min(held) <= 64 * 256


@pytest.mark.parametrize(
    "stage, lora, penalty, asked, where",
    [
        (3, None, {"coef": 0.1}, None, "sharded"),
        (2, None, {"coef": 0.1}, None, "whole"),
        (3, None, {"coef": 0.1}, "whole", "whole"),
        (0, None, {"coef": 0.1}, "offloaded", "offloaded"),
        (3, None, None, "sharded", None),
        (3, {"rank": 4}, {"coef": 0.1}, "sharded", None),
    ],
)
def test_where_the_reference_is(stage, lora, penalty, asked, where):
    deepspeed = {"optimizer": ADAMW, "zero_optimization": {"stage": stage}}
    training = {"penalty": penalty, "reference": asked}
    assert (
        placement(small_config(model={"lora": lora}, training=training, deepspeed=deepspeed))
        == where
    )


# ----------------------------------------------------------------------------------- in one process
@pytest.mark.parametrize(
    "stage, where",
    [(0, "whole"), (0, "sharded"), (2, "offloaded"), (3, "sharded"), (3, "offloaded")],
)
def test_the_reference_stays_and_the_average_follows(tmp_path, stage, where):
    """After an update: the reference's velocities are the base model's, bit for bit; the average
    goes through the copy and a file."""
    from tempflow.models import load_policy
    from tempflow.training.engine import Runtime

    distributed.init_distributed()
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    config = small_config(
        training={"penalty": {"coef": 0.1}, "reference": where},
        rollout={"refresh_bucket": 50_000},
        deepspeed={
            "optimizer": {**ADAMW, "params": {**ADAMW["params"], "lr": 1e-2}},
            "zero_optimization": zero,
        },
    )
    policy, base = (load_policy(str(MODEL), max_sequence_length=20) for _ in range(2))
    runtime = Runtime(config, policy)
    average = Average(runtime, 0.75, 1)
    x, text = (
        torch.randn(2, *policy.latent_shape(SIZE)),
        policy.encode(examples(["one", "another"])),
    )

    def velocity(transformer):
        return policy.velocity(transformer, x, torch.tensor([0.9, 0.4]), text, SIZE, 0.0)

    runtime.accumulate(velocity(runtime.engine).square().mean(), last=True)
    runtime.step(1.0)
    average.update()
    with torch.no_grad(), runtime.reference_transformer() as reference:
        assert torch.equal(velocity(reference), velocity(base.transformer))
        assert not torch.equal(velocity(runtime.engine), velocity(base.transformer))

    averages = average.gather(runtime.trainable)
    for name, start in base.transformer.named_parameters():
        trained = runtime.full_fp32(runtime.trainable[name])
        assert torch.equal(averages[name], start.detach().lerp(trained, 0.25))
    runtime.refresh(policy.transformer, average.gather)
    assert all(torch.equal(p, averages[name]) for name, p in policy.transformer.named_parameters())
    average.write(tmp_path / "ema.safetensors")
    again = Average(runtime, 0.75, 1)
    again.read(tmp_path / "ema.safetensors", 1)
    assert again.updates == 1 and all(
        torch.equal(t, averages[name]) for name, t in again.gather(runtime.trainable).items()
    )


# ------------------------------------------------------------------------------------- on two ranks
@pytest.mark.slow
def test_runs_are_the_same_wherever_the_reference_is(tmp_path):
    """All metrics and the average, of two ranks at ZeRO stage 3, bit for bit; the average is what
    is evaluated."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    whole, offloaded = (
        train(
            tmp_path,
            where,
            processes=2,
            rollout={"refresh_bucket": 50_000, "num_steps": 3, "plan": {"branch_steps": [0, 1]}},
            training={
                "iterations": 2,
                "penalty": {"coef": 0.1},
                "reference": where,
                "updates": {"passes": 2},
                "ema": {"decay": 0.5, "every": 1},
            },
            deepspeed={"optimizer": ADAMW, "zero_optimization": zero},
        )
        for where in ("whole", "offloaded")
    )
    assert [timeless(row) for row in whole.rows] == [timeless(row) for row in offloaded.rows]
    assert whole.rows[-1]["kl"] > 0 and "eval/reward" in whole.rows[-1]
    a, b = whole.weights(name="ema"), offloaded.weights(name="ema")
    assert a.keys() == b.keys() == whole.weights().keys() and all(
        torch.equal(a[name], b[name]) for name in a
    )
    assert any(not torch.equal(a[name], value) for name, value in whole.weights().items())
