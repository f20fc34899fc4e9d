"""Fixtures of the engine's tests: the shipped model, and random ones of other shapes. No test
reaches the network."""

import os
import shutil
import sys
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
HERE = Path(__file__).parent
# The tests' own helpers and rewards, the kernel tests' comparison, and the recipe of the small
# model.
for folder in (HERE, HERE.parent / "kernels", HERE.parent.parent / "recipes"):
    sys.path.insert(0, str(folder))
# last: its kernels.py must not pass for Hugging Face's package
sys.path.append(str(HERE.parent.parent / "benchmarks"))

import pytest  # noqa: E402
from engine_cases import MODEL  # noqa: E402
from family_cases import FAMILIES, pipeline_folders  # noqa: E402
from hypothesis import settings  # noqa: E402
from pipelines_flux import flux_pipeline  # noqa: E402
from run_cases import train_checked  # noqa: E402

# A busy machine is no failure of a property.
settings.register_profile("engine", deadline=None, max_examples=60)
settings.load_profile("engine")


@pytest.fixture(scope="session")
def policy():
    """The shipped model in fp32; its text length as in configs/tiny_ocr.json."""
    from tempflow.models import load_policy

    return load_policy(str(MODEL), max_sequence_length=20)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Folders of random FluxPipelines by kind: "plain", "guidance" (embedded), "shifted" (static),
    "dynamic"."""
    kinds = {
        "plain": {},
        "guidance": {"guidance_embeds": True},
        "shifted": {"shift": 3.0},
        "dynamic": {"guidance_embeds": True, "shift": 3.0, "use_dynamic_shifting": True},
    }
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: flux_pipeline(root / kind, **options) for kind, options in kinds.items()}


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory):
    """Folder of a tiny pipeline by (family, kind); see family_cases.py."""
    return pipeline_folders(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def family_pairs(family_folders):
    """By (family, kind): a policy, and diffusers' own pipeline loaded apart. Tests leave both as
    they are."""
    from tempflow.models import load_policy

    made = {}

    def get(name, kind=None):
        if (name, kind) not in made:
            folder = family_folders(name, kind)
            made[name, kind] = load_policy(str(folder)), FAMILIES[name].plain(folder)
        return made[name, kind]

    return get


@pytest.fixture
def small_condition_images(monkeypatch):
    """Images of about 64 x 64 pixels where diffusers' editing pipelines, and so the engine, scale
    condition images to a megapixel."""
    from diffusers.pipelines.flux import pipeline_flux_kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    sizes = [
        (width // 16, height // 16)
        for width, height in pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    ]
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        real = module.calculate_dimensions
        monkeypatch.setattr(
            module,
            "calculate_dimensions",
            lambda area, ratio, real=real: real(max(area / 256, 4096), ratio),
        )


@pytest.fixture
def skeleton(tmp_path):
    """A FluxPipeline folder that passes for one until its weights are read: there are none."""
    folder = tmp_path / "skeleton"
    shutil.copytree(
        MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "tokenizer*.json")
    )
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Of the runs that several tests read."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def interrupted(folder):
    """A run of 4 iterations that sends itself a signal; with all that has a state: Adam, an
    average, a decaying rate."""

    def start(name, *more, at=10**9, signal_name="SIGTERM", every=2, server=0):
        reward = {"counter": str(folder / f"{name}.count"), "at": at, "signal_name": signal_name}
        return train_checked(folder, name, more, reward, every, server=server)

    return start


@pytest.fixture(scope="session")
def whole(interrupted):
    """Undisturbed; four iterations, checkpoints at 2 and 4. Its hash seed is not that of the runs
    which are compared with it."""
    return interrupted("whole", server=1)
