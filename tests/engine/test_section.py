"""The deepspeed section is refused for what DeepSpeed would refuse once the model is loaded, or
would pass over in silence."""

import json

import pytest
from engine_cases import ROOT

from tempflow.config.deepspeed import check_deepspeed, check_machine
from tempflow.errors import UserError

ADAMW = {"type": "AdamW", "params": {"lr": 1e-4}}


def zero(**keys) -> dict:
    return {"zero_optimization": {"stage": 3, **keys}}


REFUSED = {
    "unknown key": (
        {"zero_optimisation": {}},
        ["deepspeed.zero_optimisation", "did you mean 'zero_optimization'"],
    ),
    "key like no other": ({"q\n": 1}, [r"deepspeed.'q\n'", "unknown key", ", zero_optimization"]),
    "key within": (
        zero(reduce_buckets=1),
        ["deepspeed.zero_optimization.reduce_buckets", "not permitted", "got 1"],
    ),
    "bucket": (
        zero(reduce_bucket_size="big"),
        ["deepspeed.zero_optimization.reduce_bucket_size", "integer", "got 'big'"],
    ),
    "no bucket": (
        zero(reduce_bucket_size=0),
        ["deepspeed.zero_optimization.reduce_bucket_size", "greater than 0", "got 0"],
    ),
    "offload no table": (
        zero(offload_optimizer="cpu"),
        ["deepspeed.zero_optimization.offload_optimizer", "dictionary", "got 'cpu'"],
    ),
    "offload where": (
        zero(offload_param={"device": "tape"}),
        ["offload_param.device", "'cpu' or 'nvme'", "got 'tape'"],
    ),
    "offload passed over": (
        zero(stage=2, offload_param={"device": "cpu"}),
        ["offload_param", "at ZeRO stage 2", "needs stage 3"],
    ),
    "offload path": (
        zero(offload_optimizer={"device": "nvme"}),
        ["offload_optimizer.nvme_path", "missing"],
    ),
    "flag": ({"bf16": {"enabled": "maybe"}}, ["deepspeed.bf16.enabled", "boolean", "got 'maybe'"]),
    "both halves": (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        ["deepspeed: ", "simultaneously"],
    ),
    "table": ({"activation_checkpointing": 3}, ["deepspeed.activation_checkpointing", "got 3"]),
    "tracker": ({"tensorboard": 3}, ["deepspeed.tensorboard: ", "dictionary", "got 3"]),
    "writer": (
        {"checkpoint": {"writer": {"decoupled": True}}},
        ["deepspeed.checkpoint.writer", "remove the key"],
    ),
    "clipping": (
        {"gradient_clipping": "auto"},
        ["deepspeed.gradient_clipping", "number from 0 on", "got 'auto'"],
    ),
    "optimizer": (
        {"optimizer": {"type": "Adamm"}},
        ["deepspeed.optimizer.type", "AdamW", "got 'Adamm'"],
    ),
    "no optimizer": ({"optimizer": {}}, ["deepspeed.optimizer.type", "got None"]),
    "parameters": (
        {"optimizer": {"type": "AdamW", "params": [1]}},
        ["deepspeed.optimizer.params", "table", "got [1]"],
    ),
    "rate": (
        {"optimizer": {"type": "Adam", "params": {"lr": "1e-4"}}},
        ["deepspeed.optimizer.params.lr", "number", "got '1e-4'"],
    ),
    "half of the betas": (
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}},
        ["deepspeed.optimizer.params"],
    ),
    "betas": (
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 2]}}},
        ["deepspeed.optimizer.params", "beta", "2"],
    ),
    "option of another 8-bit optimizer": (
        {"optimizer": {"type": "AdamW8bit", "params": {"lr": 1e-4, "optim_bits": 4}}},
        ["deepspeed.optimizer.params.optim_bits", "AdamW8bit takes lr, betas, eps, weight_decay"],
    ),
    "betas of the 8-bit one": (
        {"optimizer": {"type": "AdamW8bit", "params": {"betas": [0.9, 2]}}},
        ["deepspeed.optimizer.params", "beta", "2"],
    ),
    "offload of the 8-bit one": (
        {"optimizer": {"type": "AdamW8bit"}, **zero(offload_optimizer={"device": "cpu"})},
        ["deepspeed.zero_optimization.offload_optimizer", "AdamW8bit", '"none"'],
    ),
    "parameter": (
        {"optimizer": {"type": "RMSprop", "params": {"beta": 1}}},
        ["deepspeed.optimizer.params", "'beta'"],
    ),
}


@pytest.mark.parametrize("changes, words", REFUSED.values(), ids=REFUSED)
def test_refused(changes, words):
    with pytest.raises(UserError) as caught:
        check_deepspeed({"optimizer": ADAMW, **changes})
    message = str(caught.value)
    assert message.startswith("deepspeed") and "\n" not in message
    assert all(word in message for word in words), message


TAKEN = {
    "everything": {
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "aio": {"block_size": 1048576},
        "activation_checkpointing": {"partition_activations": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "flops_profiler": {"enabled": True},
        "wall_clock_breakdown": True,
        "zero_allow_untested_optimizer": True,
        **zero(
            offload_optimizer={"device": "nvme", "nvme_path": "/nvme"},
            offload_param={"device": "cpu"},
            reduce_bucket_size=5e8,
        ),
    },
    "bitsandbytes'": {"optimizer": {"type": "AdamW8bit", "params": {"lr": 1e-4}}},
    "torch's": {"optimizer": {"type": "RMSprop", "params": {"lr": 0.1, "momentum": 0.9}}},
    "DeepSpeed's": {
        "optimizer": {
            "type": "adam",
            "params": {"lr": 1e-4, "adam_w_mode": True, "torch_adam": True},
        }
    },
}


@pytest.mark.parametrize("changes", TAKEN.values(), ids=TAKEN)
def test_taken(changes):
    check_deepspeed({"optimizer": ADAMW, **changes})


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("*_*.json")), ids=lambda file: file.stem
)
def test_shipped_configs_are_taken(file):
    check_deepspeed(json.loads(file.read_text())["deepspeed"])


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_nvme_needs_an_operator_and_a_folder(monkeypatch, tmp_path, key):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def section(folder):
        return zero(**{key: {"device": "nvme", "nvme_path": str(folder)}})

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(
        UserError, match=f'^deepspeed.zero_optimization.{key}.device: "nvme" .* libaio'
    ):
        check_machine(section(tmp_path))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    check_machine(section(tmp_path))
    with pytest.raises(
        UserError, match=f"^deepspeed.zero_optimization.{key}.nvme_path: no folder .*/none"
    ):
        check_machine(section(tmp_path / "none"))
    check_machine(zero(**{key: {"device": "cpu"}}))
