"""Model folders with one thing wrong, as users have them: each is made from a copy of a whole
one."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def tensor_file(folder: Path, part: str) -> Path:
    return folder / part / f"{STEMS.get(part, 'model')}.safetensors"


def edit_json(file: Path, **keys) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def edit_tensors(folder: Path, part: str, edit) -> None:
    """edit: from a table of tensors to another."""
    file = tensor_file(folder, part)
    tensors = edit({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        file,
        metadata={"format": "pt"},
    )


def split(folder: Path, part: str, lose: bool = False) -> None:
    """Two shards with an index in place of one file; the second may be lost."""
    file = tensor_file(folder, part)
    tensors = load_file(file)
    names = sorted(tensors)
    shards = {f"{file.stem}-{n:05d}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for shard, held in shards.items():
        save_file(
            {name: tensors[name] for name in held}, file.with_name(shard), metadata={"format": "pt"}
        )
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: shard for shard, held in shards.items() for name in held},
    }
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()
    if lose:
        file.with_name(list(shards)[1]).unlink()


def rename_all(old: str, new: str):
    return lambda tensors: {
        new + name.removeprefix(old): tensor for name, tensor in tensors.items()
    }


def with_first(change):
    """Change the first weight matrix, in the order of names."""

    def edit(tensors):
        name = next(name for name in sorted(tensors) if tensors[name].ndim >= 2)
        return {**tensors, name: change(tensors[name])}

    return edit


def without(word: str):
    def edit(tensors):
        gone = next(name for name in sorted(tensors) if word in name)
        return {name: tensor for name, tensor in tensors.items() if name != gone}

    return edit


def poisoned(value: float):
    def change(tensor):
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return with_first(change)


def tensors_of(part: str, edit):
    return lambda folder: edit_tensors(folder, part, edit)


def content_of(part: str, change):
    """change: from the bytes of the tensor file to others."""

    def edit(folder):
        file = tensor_file(folder, part)
        file.write_bytes(change(file.read_bytes()))

    return edit


def config_of(file: str, **keys):
    return lambda folder: edit_json(folder / file, **keys)


def text_of(file: str, text: str):
    return lambda folder: (folder / file).write_text(text)


def emptied(part: str):
    def edit(folder):
        for file in (folder / part).iterdir():
            file.unlink()

    return edit


def moved(part: str, name: str):
    return lambda folder: tensor_file(folder, part).rename(folder / part / name)


def a_folder_for(part: str):
    def edit(folder):
        file = tensor_file(folder, part)
        file.unlink()
        file.mkdir()

    return edit


def a_broken_link(folder: Path) -> None:
    file = tensor_file(folder, "text_encoder_2")
    file.unlink()
    file.symlink_to("../../blobs/gone")


def two_variants(folder: Path) -> None:
    file = tensor_file(folder, "vae")
    shutil.copy(file, file.with_suffix(".bf16.safetensors"))
    file.rename(file.with_suffix(".fp16.safetensors"))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
SCHEDULER = "scheduler/scheduler_config.json"

# What the headers and JSON files show: (what is done to a folder, words of the message).
SHOWN = {
    "half a text encoder": (
        content_of("text_encoder", lambda data: data[: len(data) // 2]),
        ["text_encoder", "not downloaded whole"],
    ),
    "half a transformer": (
        content_of("transformer", lambda data: data[: len(data) // 2]),
        ["transformer", "not downloaded whole"],
    ),
    "a header alone": (content_of("vae", lambda data: data[:100]), ["vae", "not downloaded whole"]),
    "an empty file": (
        content_of("text_encoder_2", lambda data: b""),
        ["text_encoder_2", "is empty"],
    ),
    "a pointer": (
        content_of("transformer", lambda data: POINTER.encode()),
        ["transformer", "git-lfs pointer"],
    ),
    "a web page": (
        content_of("vae", lambda data: b"<!DOCTYPE html><html>not found"),
        ["vae", "damaged"],
    ),
    "a folder for a file": (a_folder_for("vae"), ["vae", "is a folder"]),
    "no file": (
        moved("transformer", "old.safetensors"),
        ["transformer", "has no tensor file", "it holds old.safetensors"],
    ),
    "a broken link": (
        a_broken_link,
        ["text_encoder_2", "model.safetensors is a link to a file that does not exist"],
    ),
    "pickles": (
        moved("text_encoder", "pytorch_model.bin"),
        ["text_encoder", "pytorch_model.bin", "safe_serialization"],
    ),
    "two variants": (two_variants, ["vae", "bf16, fp16"]),
    "a lost shard": (
        lambda folder: split(folder, "transformer", lose=True),
        ["transformer", "00002-of-00002"],
    ),
    "a lost shard of transformers": (
        lambda folder: split(folder, "text_encoder", lose=True),
        ["text_encoder", "00002-of-00002"],
    ),
    "no tensors": (tensors_of("vae", lambda tensors: {}), ["vae", "holds no tensors"]),
    "others' tensors": (
        tensors_of("transformer", lambda tensors: {"bert.x": torch.zeros(2)}),
        ["transformer", "lacks", "more"],
    ),
    "a transformer lacks a weight": (
        tensors_of("transformer", without("to_q.weight")),
        ["transformer", "lacks", "to_q.weight"],
    ),
    "a transformer lacks a bias": (
        tensors_of("transformer", without("to_out.0.bias")),
        ["transformer", "lacks", "to_out.0.bias"],
    ),
    "CLIP lacks a weight": (
        tensors_of("text_encoder", without("position_embedding")),
        ["text_encoder", "lacks", "position_embedding"],
    ),
    "T5 lacks a weight": (
        tensors_of("text_encoder_2", without("final_layer_norm")),
        ["text_encoder_2", "lacks", "final_layer_norm"],
    ),
    "T5 lacks its embedding": (
        tensors_of("text_encoder_2", without("shared")),
        ["text_encoder_2", "lacks", "shared"],
    ),
    "a VAE lacks a weight": (
        tensors_of("vae", without("decoder.conv_out")),
        ["vae", "lacks", "decoder.conv_out"],
    ),
    "another shape": (
        tensors_of("transformer", with_first(lambda w: w[:-1])),
        ["transformer", "asks for", "different models"],
    ),
    "another shape in T5": (
        tensors_of("text_encoder_2", with_first(lambda w: w[:-1])),
        ["text_encoder_2", "asks for"],
    ),
    "compiled": (
        tensors_of("transformer", rename_all("", "_orig_mod.")),
        ["transformer", "_orig_mod.", "torch.compile"],
    ),
    "wrapped": (
        tensors_of("transformer", rename_all("", "module.")),
        ["transformer", "'module.'", "wrapper"],
    ),
    "of one file": (
        tensors_of("transformer", rename_all("", "model.diffusion_model.")),
        ["transformer", "'model.diffusion_model.'"],
    ),
    "adapters": (
        tensors_of("transformer", lambda tensors: {"x.lora_A.weight": torch.zeros(2, 2)}),
        ["model.lora.start"],
    ),
    "NF4": (
        config_of(
            "transformer/config.json",
            quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        ),
        ["transformer/config.json", "quantized (bitsandbytes)"],
    ),
    "a quantised encoder": (
        config_of("text_encoder_2/config.json", quantization_config={"quant_method": "torchao"}),
        ["text_encoder_2/config.json", "quantized (torchao)"],
    ),
    "NF4 without config": (
        tensors_of("transformer", lambda tensors: {**tensors, "x.weight.absmax": torch.zeros(1)}),
        ["quantized"],
    ),
    "scaled float8": (
        tensors_of("transformer", lambda tensors: {**tensors, "x.scale_weight": torch.zeros(1)}),
        ["quantized"],
    ),
    "whole numbers": (
        tensors_of("transformer", lambda t: {n: w.to(torch.int8) for n, w in t.items()}),
        ["whole numbers", "quantized"],
    ),
    "no config": (lambda folder: (folder / "vae/config.json").unlink(), ["vae", "config.json"]),
    "a config that is a list": (
        text_of("text_encoder/config.json", "[]"),
        ["text_encoder", "expected a table"],
    ),
    "half a config": (
        text_of("transformer/config.json", '{"num_la'),
        ["transformer", "config.json is damaged"],
    ),
    "a config of nothing": (
        config_of("transformer/config.json", num_layers="many"),
        ["transformer", "config.json"],
    ),
    "a number of layers past all memory": (
        config_of("transformer/config.json", num_layers=10**12),
        ["transformer", "num_layers"],
    ),
    "the same in an encoder": (
        config_of("text_encoder/config.json", num_hidden_layers=10**12),
        ["text_encoder", "num_hidden_layers"],
    ),
    "a scale that is NaN": (
        config_of("vae/config.json", scaling_factor=float("nan")),
        ["vae/config.json", "scaling_factor", "nan"],
    ),
    "a scale of 0": (
        config_of("vae/config.json", scaling_factor=0),
        ["vae/config.json", "scaling_factor"],
    ),
    "a VAE without a shift": (
        config_of("vae/config.json", shift_factor=None),
        ["vae/config.json", "shift_factor", "None"],
    ),
    "more layers than tensors": (
        config_of("transformer/config.json", num_layers=9),
        ["transformer", "lacks", "transformer_blocks.2"],
    ),
    "a negative width": (
        config_of("text_encoder/config.json", hidden_size=-8),
        ["text_encoder/config.json"],
    ),
    "heads that do not divide": (
        config_of("text_encoder/config.json", num_attention_heads=7),
        ["text_encoder/config.json"],
    ),
    "an unknown class": (
        config_of("model_index.json", vae=["diffusers", "AutoencoderOfTomorrow"]),
        ["vae", "AutoencoderOfTomorrow"],
    ),
    "an unknown library": (
        config_of("model_index.json", text_encoder=["mylib", "Encoder"]),
        ["text_encoder", "mylib", "Encoder"],
    ),
    "a class that is no name": (
        config_of("model_index.json", vae=["diffusers", 7]),
        ["vae", "has no 7"],
    ),
    "a library that is no name": (
        config_of("model_index.json", vae=[7, "AutoencoderKL"]),
        ["vae", "7"],
    ),
    "no encoder": (
        config_of("model_index.json", text_encoder=[None, None]),
        ["text_encoder", "needs"],
    ),
    "no transformer": (
        config_of("model_index.json", transformer=[None, None]),
        ["transformer", "needs"],
    ),
    "an emptied tokenizer": (emptied("tokenizer"), ["tokenizer", "vocabulary"]),
    "an emptied second tokenizer": (emptied("tokenizer_2"), ["tokenizer_2", "vocabulary"]),
    "an empty tokenizer file": (
        text_of("tokenizer_2/tokenizer.json", ""),
        ["tokenizer_2", "tokenizer.json is empty"],
    ),
    "half a tokenizer": (
        text_of("tokenizer/tokenizer.json", '{"version": '),
        ["tokenizer", "tokenizer.json is damaged"],
    ),
    "a pointer for a tokenizer": (
        text_of("tokenizer_2/tokenizer.json", POINTER),
        ["tokenizer_2", "git-lfs pointer"],
    ),
    "a tokenizer of another model": (
        config_of("text_encoder/config.json", vocab_size=5),
        ["text_encoder"],
    ),
    "Heun": (
        config_of("model_index.json", scheduler=["diffusers", "FlowMatchHeunDiscreteScheduler"]),
        ["scheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"],
    ),
    "UniPC": (
        config_of("model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"]),
        ["UniPCMultistepScheduler"],
    ),
    "an inverted grid": (config_of(SCHEDULER, invert_sigmas=True), [SCHEDULER, "invert_sigmas"]),
    "noise of its own": (
        config_of(SCHEDULER, stochastic_sampling=True),
        [SCHEDULER, "stochastic_sampling"],
    ),
    "another count of timesteps": (
        config_of(SCHEDULER, num_train_timesteps=500),
        [SCHEDULER, "num_train_timesteps to 500"],
    ),
    "no shift": (config_of(SCHEDULER, shift=0.0), [SCHEDULER, "falls from 1 to 0"]),
    "a negative shift": (config_of(SCHEDULER, shift=-1.0), [SCHEDULER]),
    "a shift that is NaN": (
        config_of(SCHEDULER, shift=float("nan")),
        [SCHEDULER, "falls from 1 to 0"],
    ),
    "a shift in words": (config_of(SCHEDULER, shift="three"), [SCHEDULER]),
    "two kinds of grid": (
        config_of(SCHEDULER, use_karras_sigmas=True, use_exponential_sigmas=True),
        [SCHEDULER],
    ),
    "shifts at one length": (
        config_of(SCHEDULER, base_image_seq_len=256, max_image_seq_len=256),
        [SCHEDULER, "division"],
    ),
    "an infinite shift": (
        config_of(SCHEDULER, base_shift=float("inf"), use_dynamic_shifting=True),
        [SCHEDULER, "falls from 1 to 0"],
    ),
    "a scheduler config that is a list": (
        text_of(SCHEDULER, "[]"),
        [SCHEDULER, "expected a table"],
    ),
    "a scheduler config that is a number": (
        text_of(SCHEDULER, "Infinity"),
        [SCHEDULER, "expected a table"],
    ),
    "no scheduler config": (lambda folder: (folder / SCHEDULER).unlink(), ["scheduler"]),
}

# What only the tensors themselves show, when they are loaded.
HELD = {
    f"{value} in {part}": (tensors_of(part, poisoned(value)), [part, "NaN or infinity"])
    for part, value in (
        ("transformer", float("nan")),
        ("text_encoder", float("inf")),
        ("text_encoder_2", float("nan")),
        ("vae", float("-inf")),
    )
}

# What is whole, if unusual.
WHOLE = {
    "as shipped": lambda folder: None,
    "shards": lambda folder: [
        split(folder, part) for part in ("transformer", "text_encoder", "vae")
    ],
    "more tensors than needed": tensors_of(
        "transformer", lambda tensors: {**tensors, "x.weight": torch.zeros(2)}
    ),
    "older names of CLIP": tensors_of(
        "text_encoder",
        lambda tensors: {
            "text_model.embeddings.position_ids": torch.arange(32)[None],
            **rename_all("", "text_model.")(tensors),
        },
    ),
    "T5's embedding by its other name": tensors_of(
        "text_encoder_2",
        lambda tensors: {
            name.replace("shared", "encoder.embed_tokens"): tensor
            for name, tensor in tensors.items()
        },
    ),
    "no quantisation": config_of("transformer/config.json", quantization_config=None),
    "a grid by Karras": config_of(SCHEDULER, use_karras_sigmas=True),
    "a shifted grid": config_of(SCHEDULER, shift=3.0, use_dynamic_shifting=False),
    "a terminal": config_of(SCHEDULER, use_dynamic_shifting=True, shift_terminal=0.02),
    "another class in the scheduler's own file": config_of(
        SCHEDULER, _class_name="FlowMatchHeunDiscreteScheduler"
    ),
    "fp16 variants": lambda folder: [
        tensor_file(folder, part).rename(tensor_file(folder, part).with_suffix(".fp16.safetensors"))
        for part in ("transformer", "text_encoder", "text_encoder_2", "vae")
    ],
    "one variant": moved("text_encoder", "model.fp16.safetensors"),
}
