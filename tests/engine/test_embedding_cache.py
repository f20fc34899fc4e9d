"""Prompt embeddings on disk: kept to the bit, found by what they depend on, made anew when damaged;
encoders gone after."""

import hashlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from engine_cases import MODEL, small_config
from family_cases import FAMILIES
from PIL import Image
from pipelines_flux import flux_pipeline
from run_cases import script_here, timeless, train
from stub_policies import VideoPolicy

from tempflow.errors import UserError
from tempflow.models import embeddings, load_policy, opened
from tempflow.models.embeddings import EmbeddingCache, EmbeddingStore
from tempflow.models.flux import FluxPolicy
from tempflow.models.opened import open_model
from tempflow.types import Example

pytestmark = pytest.mark.cpu  # a run with the cache and one without it, to the last bit
PROMPTS = [
    Example('the word "ABC"'),
    Example("something else", "blurred"),
    Example('the word "ABC"', ""),
]
TENSORS = {
    "half": torch.randn(5, 3).bfloat16(),
    "mask": torch.tensor([True, False, True]),
    "shared": torch.ones(1).expand(4),
    "whole": torch.randn(2, 2, dtype=torch.float64).t(),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of a tiny pipeline by family; FLUX's is the shipped one."""
    made, root = {"flux": MODEL}, tmp_path_factory.mktemp("models")

    def get(name):
        if name not in made:
            made[name] = FAMILIES[name].build(root / name)
        return made[name]

    return get


@pytest.fixture
def loads(monkeypatch):
    """Which parts of the model were loaded, in order."""
    seen = []

    def load(*args, parts="all", **options):
        seen.append(parts)
        return load_policy(*args, parts=parts, **options)

    monkeypatch.setattr(opened, "load_policy", load)
    return seen


def config_for(model, cache, **more):
    return small_config(
        model={"path": str(model), **more},
        data={"embedding_cache": cache and str(cache)},
        rollout={"guidance_scale": 3.0},
    )


def open_with(model, cache, prompts=PROMPTS, **more):
    made = open_model(config_for(model, cache, **more), prompts, "cpu", note=lambda text: None)
    return made.policy, made.embeddings.get(prompts)


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


# -------------------------------------------------------------------------------------------- files
def test_what_is_written_is_read(tmp_path):
    store = EmbeddingStore(tmp_path, {"encoders": "a"})
    assert store.problem_with(("ein Café",)) == "missing"
    size = store.write(("ein Café",), TENSORS)
    assert (
        store.problem_with(("ein Café",)) is None
        and store.path(("ein Café",)).stat().st_size == size
    )
    same_bits(store.read(("ein Café",)), TENSORS)
    assert [p.suffix for p in store.path(("ein Café",)).parent.iterdir()] == [".safetensors"], (
        "nothing half written is left"
    )


def test_the_key_is_all_that_an_embedding_depends_on(tmp_path):
    kind = {"family": "F", "encoders": "a", "dtype": "torch.float32", "max_sequence_length": 20}
    other = [
        dict(kind, **change)
        for change in ({"encoders": "b"}, {"dtype": "torch.bfloat16"}, {"max_sequence_length": 21})
    ]
    paths = [EmbeddingStore(tmp_path, one).path(("x",)) for one in (kind, *other)] + [
        EmbeddingStore(tmp_path, kind).path(("x ",))
    ]
    assert len(set(paths)) == 5 and paths[0] == EmbeddingStore(
        tmp_path, dict(reversed(kind.items()))
    ).path(("x",))


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\xff" * len(content),
    "one bit": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed(tmp_path, harm):
    store = EmbeddingStore(tmp_path, {})
    store.write(("x",), TENSORS)
    store.path(("x",)).write_bytes(harm(store.path(("x",)).read_bytes()))
    assert store.problem_with(("x",)).startswith("damaged: ")
    with pytest.raises(
        UserError, match="data.embedding_cache: .*safetensors was whole when .* start again"
    ):
        store.read(("x",))


def test_a_file_of_another_text_is_noticed(tmp_path):
    store = EmbeddingStore(tmp_path, {})
    store.write(("x",), TENSORS)
    store.path(("y",)).parent.mkdir(parents=True, exist_ok=True)
    store.path(("x",)).rename(store.path(("y",)))
    assert (
        store.problem_with(("y",)).startswith("damaged") and store.problem_with(("x",)) == "missing"
    )


# ------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image"])
def test_a_second_start_loads_no_encoder(folders, tmp_path, loads, name):
    """And has the same bits as the first, which are those of encoding without a cache: all texts
    fit one batch."""
    model, cache = folders(name), tmp_path / "cache"
    policy, first = open_with(model, cache, max_sequence_length=16)
    assert loads == ["text", "picture"]
    encoders = [part for part in policy.pipe.components if part.startswith("text_encoder")]
    assert encoders and not any(getattr(policy.pipe, part) for part in encoders)
    _, second = open_with(model, cache, max_sequence_length=16)
    assert loads == ["text", "picture", "picture"]
    same_bits(first, second)
    _, third = open_with(model, None, max_sequence_length=16)
    assert loads[3:] == ["all"]
    same_bits(first, third)
    # prompts, "blurred", "" and the default one, "" or " "
    texts = {"flux": 2, "sd3": 4, "qwen_image": 5}[name]
    assert len(files(cache)) == texts


def test_a_damaged_file_is_named_and_made_anew(tmp_path, loads, capsys):
    cache = tmp_path / "cache"
    _, first = open_with(MODEL, cache)
    whole = {file: file.read_bytes() for file in files(cache)}
    hurt = files(cache)[0]
    hurt.write_bytes(hurt.read_bytes()[:-1])
    del loads[:]
    _, second = open_with(MODEL, cache)
    assert loads == ["text", "picture"] and files(cache) == list(whole)
    assert {file for file in whole if file.read_bytes() == whole[file]} >= set(whole) - {hurt}
    assert hurt.stat().st_size == len(whole[hurt])
    same_bits(first, second)
    said = capsys.readouterr().out
    assert str(hurt) in said and "damaged" in said and str(files(cache)[1]) not in said


def test_new_prompts_are_added_and_another_encoder_starts_over(folders, tmp_path, loads):
    cache = tmp_path / "cache"
    open_with(folders("sd3"), cache, PROMPTS[:1])
    old = files(cache)
    open_with(folders("sd3"), cache)
    assert len(files(cache)) == 4 and set(old) < set(files(cache))
    encoder = next(folders("sd3").glob("text_encoder_2/*.safetensors"))
    content = encoder.read_bytes()
    try:
        encoder.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        open_with(folders("sd3"), cache)
    finally:
        encoder.write_bytes(content)
    open_with(folders("sd3"), cache, max_sequence_length=16)
    assert len(files(cache)) == 12 and loads == ["text", "picture"] * 4


def test_a_folder_that_cannot_be_used(tmp_path, loads, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.embedding_cache: .*file"):
        open_with(MODEL, tmp_path / "file")
    many = [Example(f"number {n}") for n in range(40)]
    usage = embeddings.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(embeddings.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        UserError, match="data.embedding_cache: .* needs 0.0 GB more and has 0.0 GB free"
    ):
        open_with(MODEL, tmp_path / "cache", many)
    assert "picture" not in loads


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image"])
def test_the_vae_may_decode_in_slices_and_tiles(folders, name):
    for chosen in (False, True):
        config = config_for(folders(name), None, vae_slicing=chosen, vae_tiling=chosen)
        vae = open_model(config, PROMPTS[:1], "cpu", note=lambda text: None).policy.pipe.vae
        assert vae.use_slicing is chosen and vae.use_tiling is chosen


# -------------------------------------------------------------------------- negative prompts unused
@pytest.mark.parametrize(
    "name, scale, words",
    [
        (
            "flux",
            1.0,
            (
                "warning: the negative_prompt of 2 prompts has no effect, because FluxPipeline is"
                " not guided by a second prediction"
            ),
        ),
        (
            "sd3",
            1.0,
            (
                "warning: the negative_prompt of 2 prompts has no effect, because guidance_scale 1"
                " turns guidance off"
            ),
        ),
        ("sd3", 3.0, None),
    ],
)
def test_unused_negative_prompts_are_noted(folders, name, scale, words):
    config = config_for(folders(name), None)
    config.rollout.guidance_scale = scale
    said = []
    open_model(config, PROMPTS, "cpu", note=said.append)
    assert said == ([words] if words else [])
    del said[:]
    open_model(config, PROMPTS[:1], "cpu", note=said.append)
    assert said == []


# ----------------------------------------------------------------------------- guidance without use
@pytest.mark.parametrize("denoiser", [True, False])
@pytest.mark.parametrize("embeds", [False, True])
def test_a_guidance_scale_without_effect_is_noted(tmp_path, embeds, denoiser):
    """FLUX.1 [schnell] has no input for the scale, which its pipeline ignores; [dev] has one. The
    note does not need the denoiser, which training loads later."""
    config = config_for(flux_pipeline(tmp_path / "model", guidance_embeds=embeds), None)
    said = []
    for config.rollout.guidance_scale in (1.0, 3.0):
        open_model(config, PROMPTS[:1], "cpu", note=said.append, denoiser=denoiser)
    assert [text.split(",")[0] for text in said] == (
        [] if embeds else ["warning: guidance_scale 3 has no effect"]
    )


# --------------------------------------------------------------------------------------- whole runs
@pytest.mark.slow
def test_runs_with_negative_prompts_and_a_cache(folders, tmp_path, monkeypatch, loads):
    """A run of lines that carry a negative prompt, with a cache, is one without of plain lines
    whose default is that one: in the rollout, the updates and the evaluation. evaluate.py and
    sample.py read the cache."""
    from tempflow.models.sd3 import SD3Policy

    def lines(name, **more):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(
            "".join(
                json.dumps({"prompt": text, **more}) + "\n"
                for text in ("a cube", "two dogs", "a bench", "rain")
            )
        )
        return str(file)

    run = partial(
        train,
        tmp_path,
        processes=None,
        model={"path": str(folders("sd3")), "max_sequence_length": 16},
        rollout={
            "height": 32,
            "width": 32,
            "num_steps": 3,
            "plan": {"branch_steps": [0]},
            "guidance_scale": 3.0,
            "micro_batch": 8,
        },
        training={
            "iterations": 1,
            "updates": {"passes": 2},
            "objective": {"clip_low": 0.1, "clip_high": 0.1},
        },
        eval={"every": 1, "prompts": 4},
    )
    plain, negative = lines("plain"), lines("negative", negative_prompt="blurred, too many words")
    cached = run(
        "cached",
        data={"train": negative, "heldout": negative, "embedding_cache": str(tmp_path / "cache")},
    )
    monkeypatch.setattr(SD3Policy, "default_negative_prompt", "blurred, too many words")
    default = run("default", data={"train": plain, "heldout": plain})
    monkeypatch.undo()
    assert [timeless(row) for row in cached.rows] == [timeless(row) for row in default.rows]
    assert cached.rows[1]["grad_norm"] > 0 and loads == ["text", "picture", "all"]
    done = script_here("evaluate", "--run", cached.folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["reward"] == pytest.approx(
        cached.rows[-1]["eval/reward"], abs=1e-3
    )
    before = files(tmp_path / "cache")
    done = script_here(
        "sample",
        "--run",
        cached.folder,
        "--out",
        tmp_path / "out",
        "--prompt",
        "a new one",
        "--num-steps",
        2,
    )
    assert done.returncode == 0 and len(list((tmp_path / "out").glob("*.png"))) == 2, done.stderr
    assert len(files(tmp_path / "cache")) == len(before) + 2, (
        "the prompt and the default negative prompt"
    )


# --------------------------------------------------------------------------------- condition images
def test_condition_images_are_part_of_an_embeddings_identity(tmp_path):
    """The same text with another image is another embedding; with the same image, be it a file or a
    copy, it is encoded once."""
    policy, black, white = (
        VideoPolicy(),
        np.zeros((4, 4, 3), np.uint8),
        np.full((4, 4, 3), 255, np.uint8),
    )
    for name, image in (("one", white), ("other", white), ("third", black)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    files = [tmp_path / f"{name}.png" for name in ("one", "other", "third")]
    given = [Example("edit", images=(image,)) for image in (black, white, white.copy(), *files)] + [
        Example("edit")
    ]
    found = EmbeddingCache(policy).get(given)
    assert found["given"][:, 1].tolist() == [0, 255, 255, 255, 255, 0, 0]
    assert len(policy.embedded) == 2 * 5, (
        "five different ones, and what each of them is guided away from"
    )
    assert len({policy.identity(example) for example in given}) == 5
    for name, tensor in policy.encode(given).items():
        assert torch.equal(tensor, found[name]), name


def test_an_example_is_guided_away_from_its_negative_with_the_same_images():
    image = np.zeros((4, 4, 3), np.uint8)
    opposed = VideoPolicy.opposed(Example("edit", "blurred", (image,)))
    assert (opposed.text, opposed.negative, opposed.images) == ("blurred", None, (image,))
    assert (
        VideoPolicy.opposed(Example("edit")).text == ""
        and FluxPolicy.opposed(Example("edit", "blurred")) is None
    )


def test_each_identity_has_a_file_of_its_own(tmp_path):
    store, image = EmbeddingStore(tmp_path, {"encoders": "a"}), np.zeros((4, 4, 3), np.uint8)
    plain, edit = (VideoPolicy.identity(Example("x", images=images)) for images in ((), (image,)))
    store.write(plain, TENSORS)
    assert store.problem_with(edit) == "missing"
    store.path(edit).parent.mkdir(exist_ok=True)
    store.path(plain).rename(store.path(edit))
    assert store.problem_with(edit).startswith("damaged"), "it is of the text alone"


def test_files_of_texts_alone_keep_their_names(tmp_path):
    """A folder that was filled before condition images were known goes on serving."""
    key = json.dumps([1, {"encoders": "a"}, "ein Café"], sort_keys=True)
    assert (
        EmbeddingStore(tmp_path, {"encoders": "a"}).path(("ein Café",)).stem
        == hashlib.sha256(key.encode()).hexdigest()
    )
