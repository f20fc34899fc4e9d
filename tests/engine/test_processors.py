"""Processors of texts and images without torchvision."""

import json

import numpy as np
import pytest
from make_pipeline import VISION, qwen_processor
from PIL import Image

from tempflow.errors import UserError
from tempflow.models import processors
from tempflow.models.component import Component

TEXT = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    qwen_processor().save_pretrained(folder / "processor")
    return folder


def component(folder):
    return Component(folder, "processor", "transformers", "Qwen2VLProcessor")


def test_a_processor_is_loaded_under_its_own_name(folder):
    """So diffusers and transformers save it as the class that everybody loads."""
    import transformers

    made = component(folder).load(None)
    assert isinstance(made, transformers.Qwen2VLProcessor)
    assert (
        type(made).__name__ == "Qwen2VLProcessor"
        and type(made).__module__.split(".")[0] == "transformers"
    )
    assert (
        json.loads((folder / "processor/processor_config.json").read_text())["processor_class"]
        == "Qwen2VLProcessor"
    )


def test_a_picture_stands_for_as_many_tokens_as_it_has_patches(folder):
    """And two pictures for those of both; the patches are the pictures' own, in order."""
    made = component(folder).load(None)
    pictures = [
        Image.fromarray(np.full((height, width, 3), level, np.uint8))
        for height, width, level in ((84, 112, 0), (56, 56, 255))
    ]
    given = made(text=[2 * TEXT + "x"], images=pictures, padding=True, return_tensors="pt")
    ids = given["input_ids"][0].tolist()
    pad = made.tokenizer.convert_tokens_to_ids(VISION[2])
    assert ids.count(pad) == 3 * 4 + 2 * 2 and given["image_grid_thw"].tolist() == [
        [1, 6, 8],
        [1, 4, 4],
    ]
    first, second = given["pixel_values"].split([48, 16])
    assert (first < 0).all() and (second > 0).all()


def test_where_torchvision_is_installed_nothing_is_left_out(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(
        "transformers.Qwen2VLProcessor.from_pretrained",
        classmethod(lambda cls, path: seen.append((cls, path))),
    )
    component(folder).load(None)
    import transformers

    assert seen == [(transformers.Qwen2VLProcessor, str(folder / "processor"))]


def test_a_damaged_processor_is_named(folder, tmp_path):
    (tmp_path / "processor").mkdir()
    (tmp_path / "processor/processor_config.json").write_text("{")
    with pytest.raises(
        UserError, match="model.path: processor: .*processor cannot be loaded as a Qwen2VLProcessor"
    ):
        component(tmp_path).load(None)
