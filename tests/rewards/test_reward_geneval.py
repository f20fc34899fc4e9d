"""GenEval's rules on objects placed by hand, and the models' part on tiny random ones."""

import json

import numpy as np
import pytest
import reward_models

import geneval
from geneval import Found, GenEval, by_class, check_metadata, judge, places
from tempflow.errors import UserError


def at(x, y, size=10, shape=(100, 100)):
    """A square object with its centre at (x, y)."""
    mask = np.zeros(shape, bool)
    mask[y - size // 2 : y + size // 2, x - size // 2 : x + size // 2] = True
    return Found(np.array([x - size / 2, y - size / 2, x + size / 2, y + size / 2]), mask, 0.9)


def judged(objects, include, exclude=(), colours=()):
    return judge(
        objects,
        {"include": include, "exclude": list(exclude)},
        lambda name, found: list(colours)[: len(found)],
    )


def wanted(name, count=1, **more):
    return {"class": name, "count": count, **more}


@pytest.mark.parametrize(
    "other, expected",
    [
        ((20, 50), {"right of"}),
        ((80, 50), {"left of"}),
        ((50, 20), {"below"}),
        ((50, 80), {"above"}),
        ((20, 20), {"right of", "below"}),
        ((52, 51), set()),
        ((48, 80), {"above"}),
    ],
)
def test_places(other, expected):
    assert places(at(50, 50), at(*other)) == expected


def test_places_takes_sizes_off():
    """Offset 10, and a tenth of both widths is 10: not apart."""
    assert places(at(45, 50, 50), at(55, 50, 50)) == set()
    assert places(at(44, 50, 50), at(56, 50, 50)) == set(), "2 of 12 are left, less than half"
    assert places(at(30, 50, 50), at(70, 50, 50)) == {"left of"}


CATS = {"cat": [at(20, 20), at(80, 20), at(20, 80)]}


@pytest.mark.parametrize(
    "objects, include, exclude, colours, value",
    [
        (CATS, [wanted("cat")], [], [], 1),
        (CATS, [wanted("dog")], [], [], 0),
        (CATS, [wanted("cat", 3)], [wanted("cat", 4)], [], 1),
        (CATS, [wanted("cat", 2)], [wanted("cat", 3)], [], 1 / 2),
        (CATS, [wanted("cat", 4)], [wanted("cat", 5)], [], (3 / 4 + 1) / 2),
        (CATS, [wanted("cat"), wanted("dog")], [], [], 1 / 2),
        (CATS, [wanted("cat", 2, color="red")], [], ["red", "red", "blue"], 1),
        (CATS, [wanted("cat", 2, color="red")], [], ["red", "blue", "red"], (1 + 1 / 2) / 2),
        (CATS, [wanted("dog", color="red")], [], [], 0),
        (
            {"cat": [at(20, 20)], "dog": [at(80, 20)]},
            [wanted("cat"), wanted("dog", position=["right of", 0])],
            [],
            [],
            1,
        ),
        (
            {"cat": [at(20, 20)], "dog": [at(80, 20)]},
            [wanted("cat"), wanted("dog", position=["above", 0])],
            [],
            [],
            2 / 3,
        ),
        (
            {"dog": [at(80, 20)]},
            [wanted("cat"), wanted("dog", position=["right of", 0])],
            [],
            [],
            1 / 3,
        ),
        (
            {"cat": [at(20, 20)]},
            [wanted("cat"), wanted("dog", position=["right of", 0])],
            [],
            [],
            1 / 3,
        ),
    ],
)
def test_judge(objects, include, exclude, colours, value):
    got, faults = judged(objects, include, exclude, colours)
    assert got == pytest.approx(value) and (got == 1) == (not faults)


def test_by_class():
    masks = np.stack(
        [at(20, 20).mask, at(50, 50).mask, at(80, 80).mask, np.zeros((100, 100), bool)]
        + [at(9, 9).mask] * 20
    )
    labels = np.array([15, 15, 0, 16] + [74] * 20)
    objects = by_class(np.array([0.5, 0.8, 0.3, 0.9] + [0.95] * 20), labels, masks, threshold=0.3)
    assert {name: len(found) for name, found in objects.items()} == {
        "cat": 2,
        "clock": geneval.MOST_OBJECTS,
    }
    assert [found.score for found in objects["cat"]] == [0.8, 0.5]
    assert objects["cat"][1].box.tolist() == at(20, 20).box.tolist()


@pytest.mark.parametrize(
    "entry, words",
    [
        ({}, "include"),
        ({"include": []}, "include"),
        ({"include": ["cat"]}, "no class"),
        ({"include": [wanted("unicorn")]}, "unicorn"),
        ({"include": [{"class": "cat"}]}, "count"),
        ({"include": [wanted("cat", 0)]}, "count"),
        ({"include": [wanted("cat", color="teal")]}, "color"),
        ({"include": [wanted("cat", position=["left of", 0])]}, "position"),
        ({"include": [wanted("cat"), wanted("dog", position=["inside", 0])]}, "position"),
        ({"include": [wanted("cat"), wanted("dog", position="left of")]}, "position"),
        ({"include": [wanted("cat")], "exclude": [wanted("cat", 1.5)]}, "count"),
    ],
)
def test_metadata_refused(entry, words):
    with pytest.raises(UserError, match=words) as error:
        GenEval().check_prompts(["a cat"], [{"source": "p.jsonl:7", **entry}])
    assert str(error.value).startswith("p.jsonl:7: prompt 'a cat'")


def test_metadata_of_the_benchmark():
    line = (
        '{"tag": "position", "include": [{"class": "cup", "count": 1}, {"class": "tie", "count": 1,'
        ' "position": ["right of", 0]}]}'
    )
    check_metadata(json.loads(line))
    assert len(geneval.CLASSES) == 80 and geneval.CLASSES[64:67] == [
        "computer mouse",
        "tv remote",
        "computer keyboard",
    ]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    import torch
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("geneval")
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        num_labels=80,
    )
    detector = Mask2FormerForUniversalSegmentation(config)
    torch.nn.init.normal_(detector.class_predictor.weight, std=4.0)  # some sure, most not
    detector.save_pretrained(folder / "detector")
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "detector")
    reward_models.save_clip(folder / "clip")
    made = GenEval(
        detector=str(folder / "detector"), clip=str(folder / "clip"), device="cpu", batch=2
    )
    made.load()
    return made


def test_objects_of_a_real_model(reward):
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), np.uint8)
    found = reward.detect(images, [{}] * 3)
    assert any(found) and any(
        geneval.THRESHOLD < one.score < 1
        for objects in found
        for many in objects.values()
        for one in many
    )
    for objects in found:
        for name, many in objects.items():
            assert name in geneval.CLASSES and [one.score for one in many] == sorted(
                (one.score for one in many), reverse=True
            )
            for one in many:
                left, top, right, bottom = one.box.astype(int)
                assert (
                    one.mask.shape == (40, 56)
                    and one.mask[top:bottom, left:right].sum() == one.mask.sum()
                )
                assert (
                    one.mask[top].any()
                    and one.mask[bottom - 1].any()
                    and one.mask[:, left].any()
                    and one.mask[:, right - 1].any()
                )
    name = next(iter(next(filter(None, found))))
    scores = reward.score(images, [""] * 3, [{"include": [wanted(name)]}] * 3)
    assert scores.values.tolist() == [float(name in objects) for objects in found]
    spoilt = reward.score(
        images[:2], [""] * 2, [{"include": [wanted(name)]}, {"include": [wanted("unicorn")]}]
    )
    assert (
        spoilt.values[0] == scores.values[0]
        and np.isnan(spoilt.values[1])
        and "unicorn" in spoilt.details[1]
    )


def test_objects_are_those_of_transformers_own_postprocessing(reward, monkeypatch):
    """Which works at 384 x 384 and keeps as many candidates as the model has queries."""
    import torch

    monkeypatch.setattr(geneval, "QUERIES_KEPT", 12)
    images = np.random.default_rng(2).integers(0, 256, (2, 384, 384, 3), np.uint8)
    pixels = reward._processor(
        list(images), return_tensors="pt", input_data_format="channels_last"
    )["pixel_values"]
    with torch.inference_mode():
        out = reward._detector(pixel_values=pixels)
    theirs = reward._processor.post_process_instance_segmentation(
        out, threshold=geneval.THRESHOLD, return_binary_maps=True, target_sizes=[(384, 384)] * 2
    )
    compared = 0
    for ours, other in zip(reward.detect(images, [{}] * 2), theirs):
        expected = [
            (geneval.CLASSES[s["label_id"]], round(s["score"], 4)) for s in other["segments_info"]
        ]
        assert sorted(
            (name, round(one.score, 4)) for name, many in ours.items() for one in many
        ) == sorted(expected)
        compared += len(expected)
    assert compared >= 4


def test_colours_look_at_the_object_alone(reward):
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    found = at(30, 30, 20, (64, 64))
    colours = reward.colours(image, "cat", [found, at(20, 40, 12, (64, 64))])
    assert len(colours) == 2 and set(colours) <= set(geneval.COLOURS)
    elsewhere = np.where(found.mask[..., None], image, np.uint8(7))
    assert reward.colours(elsewhere, "cat", [found]) == colours[:1]
