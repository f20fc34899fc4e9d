"""What attention backends need, said before a model is loaded; packages and the GPU are stood in
for."""

import pytest
import torch
from engine_cases import small_config, write_config
from run_cases import script_here

from tempflow.errors import UserError
from tempflow.models import attention
from tempflow.models.attention import check_attention
from tempflow.models.hub import CARDS

HALF = {"model.dtype": torch.bfloat16, "the deepspeed section": torch.bfloat16}
PACKAGES = {"xformers": "xformers", "flash": "flash_attn", "_flash_3_hub": "kernels"}


@pytest.fixture
def machine(monkeypatch):
    """A GPU of a compute capability (None: a CPU) with these packages."""

    def make(capability, *packages):
        monkeypatch.setattr(attention, "find_spec", lambda name: True if name in packages else None)
        monkeypatch.setattr(attention, "uses_gpu", lambda: capability is not None)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "CARD")

    return make


@pytest.mark.parametrize(
    "name, family, capability",
    [
        ("native", "flux-dev", None),
        ("native", "qwen-image", (9, 0)),
        (None, "flux-dev", None),
        ("sage", "flux-dev", None),
        ("xformers", "qwen-image", (8, 0)),
        ("flash", "flux-dev", (8, 0)),
        ("flash", "flux-dev", (12, 0)),
        ("_flash_3_hub", "flux-dev", (9, 0)),
    ],
)
def test_what_has_all_it_needs_is_taken(machine, name, family, capability):
    machine(capability, *PACKAGES.values())
    check_attention(name, str(CARDS / family), HALF)


@pytest.mark.parametrize(
    "name, family, capability, dtypes, words",
    [
        ("flash", "flux-dev", (7, 5), HALF, ["compute capability 8.0 or later", "CARD has 7.5"]),
        ("_flash_3_hub", "flux-dev", (8, 0), HALF, ["compute capability 9.0, and", "CARD has 8.0"]),
        (
            "_flash_3_hub",
            "flux-dev",
            (10, 0),
            HALF,
            ["compute capability 9.0, and", "CARD has 10.0"],
        ),
        (
            "flash",
            "flux-dev",
            (9, 0),
            {**HALF, "the deepspeed section": torch.float32},
            ["float16", "the deepspeed section gives float32"],
        ),
        ("flash", "qwen-image", (9, 0), HALF, ["without a mask", "QwenImage"]),
        ("_flash_3_hub", "qwen-image", (9, 0), HALF, ["without a mask", "QwenImage"]),
        ("xformers", "flux-dev", None, HALF, ["a GPU", "on the CPU"]),
    ],
)
def test_what_is_missing_is_named(machine, name, family, capability, dtypes, words):
    machine(capability, *PACKAGES.values())
    with pytest.raises(UserError) as refused:
        check_attention(name, str(CARDS / family), dtypes)
    assert all(
        word in str(refused.value) for word in ["model.attention_backend", repr(name), *words]
    ), refused.value
    assert str(refused.value).count(";") == 0, "nothing else is missing"


def test_two_lengths_in_one_forward_need_a_mask(machine):
    """As the prompt and the negative prompt of a guided row have under ZeRO-3."""
    from tempflow.training.shares import guides_in_one

    machine((9, 0), *PACKAGES.values())
    path = str(CARDS / "z-image")
    check_attention("flash", path, HALF)
    with pytest.raises(
        UserError, match="without a mask, and with guidance under ZeRO-3 ZImage masks"
    ):
        check_attention("flash", path, HALF, True)
    asked = [
        guides_in_one(
            small_config(
                model={"path": model},
                rollout={"guidance_scale": scale},
                deepspeed={"zero_optimization": {"stage": stage}},
            )
        )
        for model, scale, stage in (
            (path, 4.0, 3),
            (path, 4.0, 2),
            (path, 0.0, 3),
            (str(CARDS / "sd35-medium"), 4.0, 3),
        )
    ]
    assert asked == [True, False, False, False]


@pytest.mark.parametrize("name, package", PACKAGES.items())
def test_a_package_that_is_not_there_is_named(machine, name, package):
    machine((9, 0))
    with pytest.raises(
        UserError, match=f"the package {package}, which is not installed .*pip install"
    ):
        check_attention(name, str(CARDS / "flux-dev"), HALF)


def test_train_says_all_of_it_at_once(tmp_path):
    config = write_config(
        tmp_path, model={"attention_backend": "flash"}, logging={"dir": str(tmp_path / "runs")}
    )
    done = script_here("train", "--config", config)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    words = [
        "error: model.attention_backend: 'flash' needs",
        "flash_attn",
        "model.dtype gives float32",
        "deepspeed section gives float32",
    ]
    assert all(word in done.stderr for word in words), done.stderr
