"""Condition images of prompts: named in prompt files, held by datasets, given on a command line."""

import json
import os
import tracemalloc

import numpy as np
import pytest
from engine_cases import MODEL, config_table
from PIL import Image

import edits as edit_recipe
from tempflow.config import HubDataset, parse_config
from tempflow.data import images as prompt_images
from tempflow.data.prompts import check_unchanged, digests, load_prompts, typed_prompts
from tempflow.errors import UserError
from tempflow.media import condition_image
from tempflow.training.start import checked_inputs
from tempflow.types import Example


def painted(file, size=(24, 16), color=(200, 30, 10), **save):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file, **save)
    return str(file)


def written(tmp_path, *entries):
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def test_a_prompt_names_one_image_or_several(tmp_path):
    """From the prompt file's folder, or by absolute path; the keys leave the metadata, and rewards
    find the paths there."""
    cat, dog = painted(tmp_path / "in" / "cat.png"), painted(tmp_path / "dog.jpg")
    file = written(
        tmp_path,
        {"prompt": "make it night", "image": "in/cat.png", "tag": 3},
        {"prompt": "put both in a car", "images": ["in/cat.png", dog]},
        {"prompt": "a car", "images": []},
        {"prompt": "a tree", "image": None},
    )
    prompts = load_prompts(file)
    assert [p.images for p in prompts] == [(cat,), (cat, dog), (), ()]
    assert [p.metadata for p in prompts] == [
        {"source": f"{file}:{n}", **more}
        for n, more in ((1, {"tag": 3}), (2, {}), (3, {}), (4, {}))
    ]
    assert (
        prompts[1].for_rewards == {"source": f"{file}:2", "images": [cat, dog]}
        and prompts[2].for_rewards is prompts[2].metadata
    )


def test_a_relative_file_gives_absolute_paths(tmp_path, monkeypatch):
    """A reward worker or another rank may have another working directory."""
    painted(tmp_path / "cat.png")
    written(tmp_path, {"prompt": "a", "image": "cat.png"})
    monkeypatch.chdir(tmp_path)
    assert load_prompts("edits.jsonl")[0].images == (str(tmp_path / "cat.png"),)


def test_flow_factorys_layout(tmp_path):
    """Names are those of its folder images/, a list may stand under "image"; a file beside the
    prompt file goes before."""
    folder = tmp_path / "sharegpt"
    one, two, beside = (
        painted(folder / "images" / "1.png"),
        painted(folder / "images" / "2.png"),
        painted(folder / "2.png"),
    )
    (folder / "train.jsonl").write_text(
        '{"prompt": "a", "image": ["1.png"]}\n{"prompt": "b", "images": ["2.png",'
        ' "images/2.png"]}\n'
    )
    assert [p.images for p in load_prompts(folder)] == [(one,), (beside, two)]


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"image": "none.png"}, ['"image"', "none.png", "does not exist"]),
        ({"images": ["good.png", "none.png"]}, ['"images"', "none.png", "does not exist"]),
        ({"image": "folder"}, ["folder", "is not a file"]),
        ({"image": "text.png"}, ["text.png", "cannot be read as an image"]),
        ({"image": "empty.png"}, ["empty.png", "cannot be read as an image"]),
        ({"image": "cut.png"}, ["cut.png", "cannot be read as an image", "truncated"]),
        ({"image": "cut.jpg"}, ["cut.jpg", "cannot be read as an image", "truncated"]),
        ({"image": "small.png"}, ["small.png", "is 8 x 200", "sides of at least 16 pixels"]),
        ({"image": "long.png"}, ["long.png", "is 16 x 400", "at most 16 times the other"]),
        ({"image": "large.png"}, ["large.png", "is 8000 x 8001", "64 megapixels"]),
        ({"image": "bomb.png"}, ["bomb.png", "cannot be read as an image"]),
        ({"image": "deep.png"}, ["deep.png", "more than 8 bits a channel", "I;16"]),
        ({"image": "https://example.com/cat.png"}, ["is a URL", "download"]),
        ({"image": 3}, ['"image" must be the path', "got 3"]),
        ({"image": ""}, ['"image" must be the path', "got ''"]),
        ({"images": ["good.png", None]}, ['"images" must be the path']),
        ({"images": {"a": "good.png"}}, ['"images" must be the path']),
        ({"image": "good.png", "images": ["good.png"]}, ['gives both "image" and "images"']),
    ],
)
def test_refused(tmp_path, entry, words):
    """With the line, the key, the file, and what is allowed; before anything is loaded."""
    painted(tmp_path / "good.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name in ("cut.png", "cut.jpg"):
        whole = (tmp_path / name, np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
        Image.fromarray(whole[1]).save(whole[0])
        whole[0].write_bytes(whole[0].read_bytes()[:-200])
    painted(tmp_path / "small.png", (8, 200))
    painted(tmp_path / "long.png", (16, 400))
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(tmp_path / "deep.png")
    for name, size in (("large.png", (8000, 8001)), ("bomb.png", (40_000, 40_000))):
        _header_alone(tmp_path / name, *size)
    file = written(tmp_path, {"prompt": "fine", "image": "good.png"}, {"prompt": "bad", **entry})
    with pytest.raises(UserError) as error:
        load_prompts(file)
    assert all(word in str(error.value) for word in [f"{file}:2: ", *words]), error.value


def _header_alone(file, width, height):
    """A PNG that says it is large: what is refused must be refused without its pixels."""
    import zlib

    def chunk(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


def test_exif_rotation_at_use(tmp_path):
    """A photo stored on its side (EXIF orientation 6) is used upright."""
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :12] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    (prompt,) = load_prompts(written(tmp_path, {"prompt": "a", "image": "photo.png"}))
    assert np.array_equal(np.asarray(condition_image(prompt.images[0])), np.rot90(pixels, -1))


def test_many_prompts_hold_no_pixels(tmp_path):
    """A file of 2000 prompts on 100 images of a megapixel: the images are 300 MB decoded."""
    for n in range(100):
        _header_alone(tmp_path / f"{n}.png", 1000, 1000)
    file = written(
        tmp_path, *({"prompt": f"edit {n}", "image": f"{n % 100}.png"} for n in range(2000))
    )
    tracemalloc.start()
    prompts = load_prompts(file)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(prompts) == 2000 and held < 3e6 and peak < 12e6


def test_what_stands_behind_an_image_does_not_matter(tmp_path):
    """As in photos that hold a short video."""
    for name in ("a.jpg", "a.png"):
        file = painted(tmp_path / name)
        with open(file, "ab") as opened:
            opened.write(bytes(1000))
        assert load_prompts(written(tmp_path, {"prompt": "a", "image": name}))[0].images == (file,)


def test_an_image_is_hashed_once(tmp_path, monkeypatch):
    """However many prompts edit it; again where it was replaced."""
    from tempflow import types

    painted(tmp_path / "a.png")
    prompts = load_prompts(
        written(tmp_path, *({"prompt": f"{n}", "image": "a.png"} for n in range(20)))
    )
    read = []
    monkeypatch.setattr(
        types.Path, "read_bytes", lambda self: read.append(self) or open(self, "rb").read()
    )
    first = [prompt.image_digests for prompt in prompts]
    painted(tmp_path / "a.png", (30, 20))
    second = [prompt.image_digests for prompt in load_prompts(tmp_path / "edits.jsonl")]
    assert len(read) == 2 and len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="a.png: cannot be read: No such file"):
        digests([Example("a", images=(str(tmp_path / "a.png"),))], [])


def test_other_images_are_other_prompts(tmp_path):
    """By content: a run goes on where the file has moved, and is refused where another image has
    its name."""
    painted(tmp_path / "a.png"), painted(tmp_path / "moved" / "a.png")
    entry = {"prompt": "make it night", "image": "a.png"}
    here, moved = (
        load_prompts(written(tmp_path, entry)),
        load_prompts(written(tmp_path / "moved", entry)),
    )
    check_unchanged(digests(here, []), digests(moved, []))
    painted(tmp_path / "moved" / "a.png", color=(0, 0, 0))
    moved = load_prompts(tmp_path / "moved" / "edits.jsonl")
    with pytest.raises(UserError, match="data.train holds other prompts"):
        check_unchanged(digests(here, []), digests(moved, []))


def test_a_family_that_takes_no_images_refuses_them(tmp_path):
    """When the prompts are read: nothing has been loaded."""
    painted(tmp_path / "cat.png")
    file = written(tmp_path, {"prompt": "a"}, {"prompt": "make it night", "image": "cat.png"})
    config = parse_config(
        config_table(
            data={"train": str(file), "heldout": None, "prompts_per_iteration": 1},
            logging={"dir": str(tmp_path), "name": "run"},
        )
    )
    assert config.model.path == str(MODEL)
    with pytest.raises(UserError, match=f"^{file}:2: has 1 image, but Flux takes text only"):
        checked_inputs(config)


def test_the_shipped_edits():
    """They are what the recipe draws and writes, no scene in both files."""
    for key, split in (("data.train", "train"), ("data.heldout", "test")):
        prompts = load_prompts(edit_recipe.FOLDER, key)
        given = [
            {"prompt": p.text, "image": os.path.relpath(p.images[0], edit_recipe.FOLDER)}
            for p in prompts
        ]
        assert given == edit_recipe.lines(split)
        for prompt in prompts:
            name = os.path.basename(prompt.images[0]).removesuffix(".png")
            assert (name in edit_recipe.HELDOUT) is (split == "test")
            assert np.array_equal(
                np.asarray(condition_image(prompt.images[0])), np.asarray(edit_recipe.draw(name))
            )


# ------------------------------------------------------------------------------------- command line
def test_images_of_a_command_line(tmp_path):
    """One entry for all prompts, or one for each; files, PIL images and arrays."""
    cat, pixels = painted(tmp_path / "cat.png"), np.full((16, 20, 3), 9, np.uint8)
    assert [p.images for p in typed_prompts(["a", "b"], "--prompt", [[cat]])] == [(cat,), (cat,)]
    assert [
        p.images
        for p in typed_prompts(["a", "b"], "--prompt", [[os.path.relpath(cat)], [cat, cat]])
    ] == [(cat,), (cat, cat)]
    (given,) = typed_prompts(["a"], "prompts", [[pixels, Image.fromarray(pixels)]], "images")
    assert len(given.images) == 2 and all(np.array_equal(image, pixels) for image in given.images)
    assert typed_prompts(["a"], "--prompt") == [Example("a")]
    with pytest.raises(UserError, match="^--image: given 2 times for 3 prompts"):
        typed_prompts(["a", "b", "c"], "--prompt", [[cat], [cat]])
    for bad in (
        str(tmp_path / "none.png"),
        3,
        np.zeros((16, 16), np.uint8),
        np.zeros((16, 8, 3), np.uint8),
    ):
        with pytest.raises(UserError, match="^--image: "):
            typed_prompts(["a"], "--prompt", [[bad]])


def test_options_of_the_commands(tmp_path):
    """--image belongs to --prompt, in sample.py and refine.py; several of one prompt stand behind
    one --image."""
    from tempflow.commands import refine, sample

    cat, dog = painted(tmp_path / "cat.png"), painted(tmp_path / "dog.png")
    given = [
        "--run",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--prompt",
        "a",
        "--prompt",
        "b",
    ]
    for command in (sample, refine):
        args = command.parse_args([*given, "--image", cat, dog, "--image", dog])
        assert [p.images for p in command.chosen_prompts(args, None)] == [(cat, dog), (dog,)]
        assert [p.images for p in command.chosen_prompts(command.parse_args(given), None)] == [
            (),
            (),
        ]
        with pytest.raises(UserError, match="^--image: belongs to a --prompt"):
            command.chosen_prompts(command.parse_args([*given[:4], "--image", cat]), None)


# ----------------------------------------------------------------------------------------- datasets
@pytest.fixture
def dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    files = [painted(tmp_path / f"{n}.png", color=(n, 0, 0)) for n in (10, 20, 30)]
    rows = {
        "prompt": ["a", "b"],
        "source_img": files[:2],
        "others": [[files[2]], []],
        "tag": [1, 2],
        "target_img": files[1:],
    }
    kinds = {
        "source_img": datasets.Image(),
        "others": datasets.List(datasets.Image()),
        "target_img": datasets.Image(),
    }
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "tag": datasets.Value("int64"), **kinds}
    )
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(
        tmp_path / "set" / "train.parquet"
    )
    return str(tmp_path / "set")


def test_a_datasets_columns(dataset):
    """Of images or lists of images, as arrays; other image columns are not decoded."""
    prompts = load_prompts(
        HubDataset(dataset=dataset, images=["source_img", "others"], metadata=["tag"])
    )
    assert [[image[0, 0, 0] for image in p.images] for p in prompts] == [[10, 30], [20]]
    assert all(
        image.dtype == np.uint8 and image.shape == (16, 24, 3)
        for p in prompts
        for image in p.images
    )
    assert [p.metadata for p in prompts] == [
        {"tag": n + 1, "source": f"{dataset}[train]:{n}"} for n in (0, 1)
    ]
    assert prompts[0].for_rewards["images"][0] is prompts[0].images[0]
    without = load_prompts(HubDataset(dataset=dataset))
    assert without == [
        Example(text, metadata={"source": f"{dataset}[train]:{n}"}) for n, text in enumerate("ab")
    ]


def test_a_datasets_columns_refused(dataset, monkeypatch):
    with pytest.raises(
        UserError, match="data.train.images: .* has no column image; it has prompt, "
    ):
        load_prompts(HubDataset(dataset=dataset, images=["image"]))
    with pytest.raises(
        UserError, match=r"\[train\]:0: tag: expected an image or a list of images .*, got 1"
    ):
        load_prompts(HubDataset(dataset=dataset, images=["tag"]))
    monkeypatch.setattr("tempflow.data.prompts.MOST_HELD", 2000)
    with pytest.raises(UserError, match="first 2 of 2 rows .*train\\[:1000\\]"):
        load_prompts(HubDataset(dataset=dataset, images=["source_img"]))
    assert prompt_images.MOST_HELD == 4 << 30
