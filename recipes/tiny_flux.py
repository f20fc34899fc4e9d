"""Builds the small model that ships with the project: a real diffusers FluxPipeline that draws
short words, with spelling errors.

    python recipes/tiny_flux.py                  # about 20 minutes on 2 cores; finished stages are
    kept
    python recipes/tiny_flux.py --work FOLDER    # where stages are kept between runs

The stages are: prompts, VAE, latents, text encoders and transformer, pipeline folder with a model
card. Training stops at the first check at which the mean OCR reward reaches `--target`. This gives
a base model that is good enough to get rewards, and bad enough to improve.

The T5 encoder has a zero embedding for padding, and attends within 8 tokens only, so padding far
from the text encodes to exactly zero, whatever the length of the text. Such tokens are equal to
each other. They can be trained as one token whose attention logit is raised by log(n), where n is
the number of tokens that it stands for; this gives exactly the same attention, with 44 tokens
instead of diffusers' default of 512. One batch in three is trained in this way. But hundreds of
equal tokens would still take most of the attention, and the model does not learn by training alone
to ignore them. Therefore a channel marks padding, and weights that are held constant turn attention
away from it (`pin_padding_flag`).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

import words as tiny_words
from tempflow.rewards.ocr import OcrReward
from tiny_flux_parts import (
    FULL_TEXT,
    LATENT_CHANNELS,
    LATENT_HEIGHT,
    LATENT_WIDTH,
    LONG_TEXT,
    SHORT_TEXT,
    new_text_encoders,
    new_tokenizers,
    new_transformer,
    new_vae,
    pin_padding_flag,
    pin_text_reach,
    scale_to_padding_flag,
)

ASSETS = Path(__file__).parent.parent / "engine/tempflow/assets"
TOKENS = LATENT_HEIGHT // 2 * (LATENT_WIDTH // 2)


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )


# ----------------------------------------------------------------------------------------- pictures
def picture_batch(count: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
    """Images in [-1, 1], fp32 [count, 3, 32, 96], and their words."""
    words = [tiny_words.random_word(rng) for _ in range(count)]
    pictures = np.stack([tiny_words.render(word, rng) for word in words])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, words


@lru_cache
def _ocr() -> OcrReward:
    reward = OcrReward(detect=False)
    reward.load(torch.get_num_threads())
    return reward


def spelling(pictures: np.ndarray, words: list[str]) -> float:
    """The mean OCR reward of images, uint8 [n, 32, 96, 3], that should show these words."""
    prompts = [tiny_words.prompt_of(word) for word in words]
    return float(_ocr().score(pictures, prompts, [{}] * len(words)).values.mean())


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def vae_loss(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """The reconstruction loss of noised latents, with a weak term that moves the latents to unit
    variance.

    Hue is a small part of the absolute error and is learned last, so it has a loss term of its own.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        rebuilt = vae.decode(posterior.mean + 0.2 * torch.randn_like(posterior.mean)).sample
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    scale = 1e-3 * (mean.square() + logvar.exp() - logvar - 1).mean()
    error = rebuilt.float() - pictures
    hue = error - error.mean(1, keepdim=True)
    return (
        error.abs().mean()
        + 2 * error.square().mean()
        + 4 * hue.abs().mean()
        + 8 * hue.square().mean()
        + scale
    )


def train_vae(steps: int, rng: np.random.Generator) -> tuple[AutoencoderKL, dict]:
    vae, batch = new_vae(), 48
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    with progress() as bar:
        task = bar.add_task("VAE", total=steps, status="")
        for _ in range(steps):
            loss = vae_loss(vae, picture_batch(batch, rng)[0])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, status=f"loss {loss.item():.4f}")
    with torch.no_grad():
        pictures, words = picture_batch(512, rng)
        latents = vae.encode(pictures).latent_dist.mean
        vae.register_to_config(
            shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item()
        )
        noised = latents + 0.2 * latents.std() * torch.randn_like(latents)
        seen = {
            "ocr_ground_truth": spelling(to_uint8(pictures), words),
            "ocr_reconstruction": spelling(to_uint8(vae.decode(latents).sample), words),
            "ocr_reconstruction_noised": spelling(to_uint8(vae.decode(noised).sample), words),
            "reconstruction_mae": (vae.decode(latents).sample - pictures).abs().mean().item() / 2,
        }
    return vae.eval(), seen


def tokenize(pipe: dict, words: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = [tiny_words.prompt_of(word) for word in words]
    clip = pipe["tokenizer"](
        prompts, padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    )
    t5 = pipe["tokenizer_2"](
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return clip.input_ids, t5.input_ids


def pack(latents: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._pack_latents(
        latents, len(latents), LATENT_CHANNELS, LATENT_HEIGHT, LATENT_WIDTH
    )


def image_ids() -> torch.Tensor:
    return FluxPipeline._prepare_latent_image_ids(
        1, LATENT_HEIGHT // 2, LATENT_WIDTH // 2, "cpu", torch.float32
    )


def far_padding_bias(length: int, copies: float) -> torch.Tensor:
    """An additive attention mask with which the last text token stands for `copies` equal ones."""
    mask = torch.zeros(1, 1, 1, length + TOKENS)
    mask[..., length - 1] = math.log(copies)
    return mask


def velocity(
    parts: dict, x: torch.Tensor, sigma: torch.Tensor, ids: tuple, mask: torch.Tensor | None
) -> torch.Tensor:
    clip_ids, t5_ids = ids
    pooled = parts["text_encoder"](clip_ids).pooler_output
    hidden = parts["text_encoder_2"](t5_ids)[0]
    extra = {} if mask is None else {"attention_mask": mask.to(torch.get_autocast_dtype("cpu"))}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return parts["transformer"](
            hidden_states=x,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=image_ids(),
            txt_ids=torch.zeros(hidden.shape[1], 3),
            joint_attention_kwargs=extra,
            return_dict=False,
        )[0].float()


@torch.no_grad()
def encode_latents(
    vae: AutoencoderKL, count: int, rng: np.random.Generator
) -> tuple[torch.Tensor, list[str]]:
    latents, words = [], []
    with progress() as bar:
        task = bar.add_task("latents", total=count, status="")
        for _ in range(count // 500):
            pictures, batch_words = picture_batch(500, rng)
            scaled = (
                vae.encode(pictures).latent_dist.mean - vae.config.shift_factor
            ) * vae.config.scaling_factor
            latents.append(pack(scaled))
            words += batch_words
            bar.update(task, advance=500)
    return torch.cat(latents), words


def training_loss(parts: dict, latents: torch.Tensor, words: list[str], full: bool) -> torch.Tensor:
    """The flow-matching loss at sigma = sigmoid(N(0.3, 1.2)), with SHORT_TEXT tokens or as with
    FULL_TEXT tokens."""
    length, mask = SHORT_TEXT, None
    if full:
        length, mask = LONG_TEXT, far_padding_bias(LONG_TEXT, FULL_TEXT - LONG_TEXT + 1)
    sigma = torch.sigmoid(0.3 + 1.2 * torch.randn(len(latents)))
    noise = torch.randn_like(latents)
    mixed = (1 - sigma)[:, None, None] * latents + sigma[:, None, None] * noise
    predicted = velocity(parts, mixed, sigma, tokenize(parts, words, length), mask)
    return (predicted - (noise - latents)).square().mean()


@torch.no_grad()
def sample(parts: dict, vae: AutoencoderKL, words: list[str], steps: int = 10) -> np.ndarray:
    """Images of the ODE from fixed noise, as with FULL_TEXT tokens, uint8 [n, 32, 96, 3]."""
    x = torch.randn(
        len(words), TOKENS, 4 * LATENT_CHANNELS, generator=torch.Generator().manual_seed(1)
    )
    ids, mask = (
        tokenize(parts, words, LONG_TEXT),
        far_padding_bias(LONG_TEXT, FULL_TEXT - LONG_TEXT + 1),
    )
    for k in range(steps):
        x = x - velocity(parts, x, torch.full((len(words),), 1 - k / steps), ids, mask) / steps
    latents = FluxPipeline._unpack_latents(x, tiny_words.HEIGHT, tiny_words.WIDTH, 4)
    return to_uint8(
        vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    )


class Average:
    """Exponential moving average of the weights of several modules, with a warm-up of the decay."""

    def __init__(self, parts: dict, decay: float):
        self.decay, self.steps = decay, 0
        self.parts = {name: copy.deepcopy(module) for name, module in parts.items()}

    @torch.no_grad()
    def update(self, parts: dict) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for name, module in parts.items():
            for mean, value in zip(self.parts[name].parameters(), module.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)


def train_transformer(
    args, vae: AutoencoderKL, heldout: list[str], rng: np.random.Generator
) -> tuple[dict, list]:
    """Train until the averaged weights reach the target reward. Returns them, and the checks that
    were made."""
    latents, words = encode_latents(vae, 24_000, rng)
    tokenizer, tokenizer_2 = new_tokenizers()
    text_encoder, text_encoder_2 = new_text_encoders(len(tokenizer), len(tokenizer_2))
    modules = {
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "transformer": new_transformer(),
    }
    tools = {"tokenizer": tokenizer, "tokenizer_2": tokenizer_2}
    scale_to_padding_flag(modules)
    pin_padding_flag(modules)
    average = Average(modules, decay=0.998)
    weights = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    checks: list[dict] = []
    recent: dict[bool, list[float]] = {True: [], False: []}
    with progress() as bar:
        task = bar.add_task("transformer", total=args.steps, status="")
        for step in range(1, args.steps + 1):
            chosen = torch.from_numpy(rng.integers(0, len(latents), 64))
            full = step % 3 == 0
            loss = training_loss(
                {**modules, **tools}, latents[chosen], [words[i] for i in chosen], full
            )
            recent[full].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            warm_up.step()
            pin_text_reach(text_encoder_2)
            pin_padding_flag(modules)
            average.update(modules)
            if step % args.check_every == 0:
                reward = spelling(sample({**average.parts, **tools}, vae, heldout), heldout)
                losses = {
                    f"loss_{n}": round(float(np.mean(recent[full])), 4)
                    for n, full in ((SHORT_TEXT, False), (FULL_TEXT, True))
                }
                recent = {True: [], False: []}
                checks.append({"step": step, **losses, "ocr": round(reward, 4)})
                bar.console.print(checks[-1])
                if reward >= args.target:
                    break
            bar.update(task, advance=1, status=f"loss {loss.item():.3f}")
    return {**average.parts, **tools}, checks


# ------------------------------------------------------------------------------------------- folder
def save_pipeline(parts: dict, vae: AutoencoderKL, out: Path) -> FluxPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    pipe = FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        **{
            k: parts[k]
            for k in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
        },
    )
    pipe.save_pretrained(out)
    return FluxPipeline.from_pretrained(out)


def check_pipeline(pipe: FluxPipeline, heldout: list[str]) -> dict:
    """The OCR reward of the saved folder through diffusers alone, at a short and at the default
    text length."""
    pipe.set_progress_bar_config(disable=True)
    seen = {}
    for steps, length in ((10, SHORT_TEXT), (10, FULL_TEXT), (28, FULL_TEXT)):
        pictures = []
        for first in range(0, len(heldout), 32):
            prompts = [tiny_words.prompt_of(word) for word in heldout[first : first + 32]]
            pictures.append(
                pipe(
                    prompts,
                    height=32,
                    width=96,
                    num_inference_steps=steps,
                    max_sequence_length=length,
                    generator=torch.Generator().manual_seed(first),
                    output_type="np",
                ).images
            )
        pictures = (np.concatenate(pictures) * 255).round().astype(np.uint8)
        seen[f"ocr_{steps}_steps_{length}_tokens"] = round(spelling(pictures, heldout), 4)
    return seen


def write_card(out: Path, facts: dict) -> None:
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    (out / "README.md").write_text(
        "---\nlicense: apache-2.0\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\n#"
        f" tiny-flux\nA real diffusers `FluxPipeline` of {facts['parameters (M)']} M parameters"
        " that spells the quoted word of its prompt, somewhat badly: the base model of this"
        " project's examples and tests. Built by `python recipes/tiny_flux.py`.\n\n```python\nfrom"
        " diffusers import FluxPipeline\npipe ="
        " FluxPipeline.from_pretrained('engine/tempflow/assets/tiny-flux')\npipe('the word"
        ' "HELLO"\', height=32, width=96).images[0]\n```\n\nIt knows one prompt form, `the word'
        ' "XXXXX"`, with 3 to 5 capital letters, at 32 x 96 pixels; other prompts and sizes give'
        " nothing of use. It ignores padding of the text: `max_sequence_length=20` is several"
        " times faster than diffusers' default of 512 and spells as well.\n\n## Numbers seen when"
        " it was built\n| what | value |\n|---|---|\n" + rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ASSETS / "tiny-flux")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny-flux-recipe"), help="kept between runs"
    )
    parser.add_argument(
        "--target", type=float, default=0.455, help="held-out OCR reward at which training stops"
    )
    parser.add_argument("--vae-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=5000, help="most transformer steps")
    parser.add_argument("--check-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.time()
    heldout = tiny_words.write_prompts(ASSETS / "prompts", args.seed)["heldout"][
        : tiny_words.FIRST_HELDOUT
    ]

    vae_file, vae_facts = args.work / "vae.safetensors", args.work / "vae.json"
    torch.manual_seed(args.seed)
    if vae_facts.exists():
        facts = json.loads(vae_facts.read_text())
        vae = new_vae().eval()
        vae.load_state_dict(load_file(vae_file))
        vae.register_to_config(**facts["config"])
    else:
        vae, seen = train_vae(args.vae_steps, np.random.default_rng(args.seed + 1))
        facts = {
            "config": {k: vae.config[k] for k in ("shift_factor", "scaling_factor")},
            "seen": seen,
        }
        save_file(vae.state_dict(), vae_file)
        vae_facts.write_text(json.dumps(facts))
    print("VAE:", facts["seen"], f"{(time.time() - started) / 60:.1f} min", flush=True)

    torch.manual_seed(args.seed + 2)
    vae.requires_grad_(False)
    parts, checks = train_transformer(args, vae, heldout, np.random.default_rng(args.seed + 3))
    pipe = save_pipeline(parts, vae, args.out)
    models = [pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    size = sum(p.numel() for model in models for p in model.parameters()) / 1e6
    write_card(
        args.out,
        {
            "parameters (M)": round(size, 2),
            **{k: round(v, 4) for k, v in facts["seen"].items()},
            "transformer steps": checks[-1]["step"],
            **check_pipeline(pipe, heldout),
            "minutes on this many threads": f"{(time.time() - started) / 60:.0f} on {args.threads}",
            "seed": args.seed,
        },
    )
    (args.work / "checks.json").write_text(json.dumps(checks))
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()
