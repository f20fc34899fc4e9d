"""Tiny random models of the real classes, saved as their hub repositories are; seeded, in a
folder."""

import json
import string

import torch
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLModel,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tempflow.rewards import RewardSpec
from tempflow.rewards.registry import load_rewards

SIZE, WIDTH, EMBEDDING = 28, 32, 24  # pixels of a side; of the towers; of the shared space
CHARACTERS = list(string.printable)
END = 2 * len(CHARACTERS) + 1  # id of the end-of-text, CLIP's highest
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def randomised(model):
    """Weights large enough that scores depend on every part."""
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


def clip_config(**text):
    return CLIPConfig(
        text_config={
            **TOWER,
            "vocab_size": END + 1,
            "max_position_embeddings": 77,
            "projection_dim": EMBEDDING,
            "bos_token_id": END - 1,
            "eos_token_id": END,
            "pad_token_id": END,
            **text,
        },
        vision_config={**TOWER, "image_size": SIZE, "patch_size": 14, "projection_dim": EMBEDDING},
        projection_dim=EMBEDDING,
    )


def save_clip_parts(folder, config):
    """Config, tokenizer and image processor, without weights."""
    names = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    config.save_pretrained(folder)
    CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77
    ).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(folder)


def save_clip(folder, seed=5):
    """A CLIP repository; the model."""
    torch.manual_seed(seed)
    model = randomised(CLIPModel(clip_config()))
    model.logit_scale.data.fill_(4.6)
    save_clip_parts(folder, model.config)
    model.save_pretrained(folder)
    return model


def save_head(file, names, widths, seed=1):
    """Linear layers under `names`, leading through `widths`."""
    torch.manual_seed(seed)
    tensors = {}
    for name, before, after in zip(names, widths, widths[1:]):
        tensors |= {f"{name}weight": torch.randn(after, before), f"{name}bias": torch.randn(after)}
    save_file(tensors, file)
    return tensors


def open_clip_tensors(seed=2):
    """A CLIP ViT of the same sizes in open_clip's layout, as HPSv2 is published."""
    torch.manual_seed(seed)
    r = lambda *shape: 0.3 * torch.randn(*shape)  # noqa: E731
    tensors = {
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": r(END + 1, WIDTH),
        "positional_embedding": r(77, WIDTH),
        "ln_final.weight": r(WIDTH),
        "ln_final.bias": r(WIDTH),
        "text_projection": r(WIDTH, EMBEDDING),
        "visual.class_embedding": r(WIDTH),
        "visual.conv1.weight": r(WIDTH, 3, 14, 14),
        "visual.positional_embedding": r((SIZE // 14) ** 2 + 1, WIDTH),
        "visual.proj": r(WIDTH, EMBEDDING),
    }
    for norm in ("visual.ln_pre", "visual.ln_post"):
        tensors |= {f"{norm}.weight": r(WIDTH), f"{norm}.bias": r(WIDTH)}
    for tower in ("", "visual."):
        for i in range(2):
            block = f"{tower}transformer.resblocks.{i}."
            shapes = {
                "ln_1.": [WIDTH],
                "ln_2.": [WIDTH],
                "attn.in_proj_": [3 * WIDTH, WIDTH],
                "attn.out_proj.": [WIDTH, WIDTH],
                "mlp.c_fc.": [48, WIDTH],
                "mlp.c_proj.": [WIDTH, 48],
            }
            for name, shape in shapes.items():
                tensors |= {f"{block}{name}weight": r(*shape), f"{block}{name}bias": r(shape[0])}
    return tensors


def save_imagereward(folder):
    """ImageReward in its published layout (BLIP's own names) and BERT's tokenizer; vision, text,
    head."""
    torch.manual_seed(3)
    config = BlipConfig(
        vision_config={**TOWER, "image_size": SIZE, "patch_size": 14, "layer_norm_eps": 1e-6},
        text_config={
            **TOWER,
            "hidden_size": 40,
            "vocab_size": 300,
            "max_position_embeddings": 64,
            "encoder_hidden_size": WIDTH,
        },
    )
    vision = randomised(BlipVisionModel(config.vision_config))
    text = randomised(BlipTextModel(config.text_config, add_pooling_layer=False))
    head = save_head(folder / "model.safetensors", ["mlp.layers.0.", "mlp.layers.2."], [40, 8, 1])
    tensors = {
        f"blip.text_encoder.{name}": tensor for name, tensor in text.state_dict().items()
    } | head
    renames = [
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("encoder.layers", "blocks"),
        ("layer_norm1", "norm1"),
        ("layer_norm2", "norm2"),
        ("self_attn.qkv", "attn.qkv"),
        ("self_attn.projection", "attn.proj"),
        ("post_layernorm", "norm"),
    ]
    for name, tensor in vision.state_dict().items():
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        tensors[f"blip.visual_encoder.{name}"] = tensor
    tensors |= {
        "blip.text_encoder.embeddings.position_ids": torch.arange(64),
        "blip.vision_proj.weight": torch.zeros(2, 2),
    }
    save_file(tensors, folder / "model.safetensors")
    config.save_pretrained(folder)
    letters = [prefix + c for prefix in ("", "##") for c in string.ascii_lowercase + string.digits]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    BertTokenizer(vocab={name: i for i, name in enumerate(names)}).save_pretrained(folder)
    return vision, text, head


def byte_characters():
    """The 256 characters that stand for bytes in byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def save_hpsv3(base, weights, legacy=False):
    """A Qwen2-VL repository without weights, and HPSv3's tensors in `weights`; the model and the
    head."""
    torch.manual_seed(4)
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
    ]
    names = [*byte_characters(), *special]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = Qwen2Tokenizer(
        vocab={name: ids[name] for name in names[:257]}, merges=[], pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(special, special_tokens=True)
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": len(names) + 1,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2},
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        video_token_id=len(names) + 7,
    )
    model = randomised(Qwen2VLModel(config))
    head = [randomised(torch.nn.Linear(*shape)) for shape in ((WIDTH, 8), (8, 4), (4, 2))]
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if legacy:  # the names of transformers before 4.52
        tensors = {
            name.replace("model.language_model.", "model.").replace(
                "model.visual.", "visual."
            ): tensor
            for name, tensor in tensors.items()
        }
    tensors["lm_head.weight"] = torch.zeros(len(names) + 1, WIDTH)
    for i, layer in zip((0, 3, 5), head):
        tensors |= {
            f"rm_head.{i}.weight": layer.weight.detach(),
            f"rm_head.{i}.bias": layer.bias.detach(),
        }
    save_file(tensors, weights / "HPSv3.safetensors")
    tokenizer.save_pretrained(base)
    Qwen2VLImageProcessorPil().save_pretrained(base)
    config.text_config.vocab_size = len(names) + 40  # Qwen's own is padded; HPSv3's is not
    config.save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["model_type"] == "qwen2_vl"
    return model, head, tokenizer


HEAD_MLP = ["layers.0.", "layers.2.", "layers.4."]


def options_of(models, name):
    folders = {key: str(folder) for key, folder in models["folders"].items()}
    return {
        "pickscore": {"path": folders["clip"]},
        "clip_image": {"path": folders["clip"]},
        "clipscore": {"path": folders["clip"]},
        "hpsv2": {"path": folders["hps"], "base": folders["hps_base"]},
        "aesthetic": {"path": folders["clip"], "head": folders["clip"] + "/head.safetensors"},
        "imagereward": {"path": folders["imagereward"], "tokenizer": folders["imagereward"]},
        "hpsv3": {"path": folders["hpsv3"], "base": folders["qwen"], "dtype": "float32"},
    }[name]


def loaded(models, name, **options):
    return load_rewards(
        [RewardSpec(name, 1.0, {**options_of(models, name), **options})], threads=1
    )[name]


def save_models(make_folder):
    """Every model that the tests read; folders by name, and the tensors or modules they hold.
    make_folder: from a name."""
    folders = {
        name: make_folder(name)
        for name in ("clip", "hps_base", "hps", "imagereward", "qwen", "hpsv3")
    }
    made = {"folders": folders, "clip": save_clip(folders["clip"])}
    made["mlp"] = save_head(folders["clip"] / "head.safetensors", HEAD_MLP, [EMBEDDING, 12, 5, 1])
    folders["linear"] = folders["clip"].parent / "linear.safetensors"
    made["linear"] = save_head(folders["linear"], [""], [EMBEDDING, 1])
    # as the published base has it
    save_clip_parts(folders["hps_base"], clip_config(eos_token_id=2))
    made["hps"] = open_clip_tensors()
    save_file(
        {f"model.{name}": tensor for name, tensor in made["hps"].items()},
        folders["hps"] / "model.safetensors",
    )
    made["imagereward"] = save_imagereward(folders["imagereward"])
    made["hpsv3"] = save_hpsv3(folders["qwen"], folders["hpsv3"])
    return made
