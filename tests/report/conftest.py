"""Synthetic run directories: a plausible TempFlow-GRPO run, or one that lacks whatever a test takes
away."""

import json
import math
import random

import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

STEPS = range(9)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def words(count, seed=0):
    source = random.Random(seed)
    return ["".join(source.choices(LETTERS, k=source.randint(3, 5))) for _ in range(count)]


def heldout_reward(iteration, total):
    return 0.48 + 0.31 * (1 - math.exp(-3.0 * iteration / total))


def metrics_row(iteration, total, source):
    mean = heldout_reward(iteration, total) - 0.04 + source.gauss(0, 0.03)
    row = {
        "iteration": iteration,
        "reward/mean": mean,
        "reward/std": 0.33 + source.gauss(0, 0.01),
        "reward/ocr": mean,
        "reward/zero_std_groups": 0.05 + 0.2 * iteration / total + source.random() * 0.05,
        "reward/failed": int(source.random() < 0.1),
        "loss": source.gauss(0, 2e-4),
        "kl": 3e-4 * iteration,
        "ratio/max_dev": abs(source.gauss(0, 2e-3)),
        "ratio/min": 0.998,
        "clip_fraction": source.random() * 0.2,
        "grad_norm": 0.4 + source.random() * 0.2,
        "lr": 1e-4 * (1 - iteration / total),
        "images": 432,
        "images/total": 432 * iteration,
        "forwards/rollout": 2240,
        "forwards/train": 216,
        "time/rollout": 2.2,
        "time/decode": 1.0,
        "time/reward": 1.8,
        "time/train": 0.6,
        "time/sync": 0.05,
        "time/total": 5.9,
        "time/elapsed": 6.3 * iteration,
        "advantage/max": 2.0,
    }
    row.update(
        {
            f"reward_std/step_{step}": 0.3 * math.exp(-step / 3) * (1 + source.random() * 0.3)
            for step in STEPS
        }
    )
    return row


def picture(word, quality, size, source):
    width, height = size
    image = Image.new("RGB", size, tuple(source.randint(200, 255) for _ in range(3)))
    font = ImageFont.load_default(size=height * 0.7 if width > height else height * 0.25)
    ImageDraw.Draw(image).text(
        (width / 2, height / 2), word, fill=(30, 30, 60), font=font, anchor="mm"
    )
    return image.filter(ImageFilter.GaussianBlur((1 - quality) * height / 20))


def corrupt(word, quality, source):
    kept = [
        letter if source.random() < quality else source.choice(LETTERS + " ") for letter in word
    ]
    return "".join(letter for letter in kept if letter != " ")


def write_samples(
    run_dir,
    iteration,
    prompts,
    *,
    quality,
    size=(96, 32),
    details=True,
    rewards=("ocr",),
    seed=0,
    conditions=False,
):
    folder = run_dir / "samples" / f"{iteration:06d}"
    folder.mkdir(parents=True)
    source, items = random.Random(1000 * seed + iteration), []
    for place, prompt in enumerate(prompts):
        word = prompt.split('"')[1] if prompt.count('"') > 1 else "?"
        read = corrupt(word, quality, source)
        reward = sum(a == b for a, b in zip(read, word)) / len(word)
        picture(read, quality, size, random.Random(place)).save(folder / f"{place:04d}.png")
        item = {
            "prompt": prompt,
            "file": f"{place:04d}.png",
            "rewards": {name: reward for name in rewards},
            "reward": reward,
        }
        if conditions:
            name = f"{place:04d}_condition.png"
            picture("?", 1, (48, 32), random.Random(place)).save(folder / name)
            item |= {"condition": name, "images": [f"/data/{place}.png"]}
        items.append({**item, "details": {"ocr": read}} if details else item)
    mean = sum(item["reward"] for item in items) / max(1, len(items))
    info = {
        "iteration": iteration,
        "num_steps": 20,
        "seed": 7,
        "weights": "ema",
        "reward": mean,
        "items": items,
    }
    (folder / "samples.json").write_text(json.dumps(info))
    return folder


def write_rows(run_dir, rows):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


CONFIG = {
    "model": {"path": "tiny-flux", "dtype": "float32", "lora": None},
    "data": {"train": "words.txt", "heldout": "heldout.txt", "prompts_per_iteration": 8},
    "rollout": {
        "plan": {"type": "tempflow", "seeds": 1, "children": 6, "branch_steps": "all"},
        "height": 32,
        "width": 96,
        "num_steps": 10,
        "sde": {"type": "flow", "eta": 0.7},
    },
    "rewards": {"ocr": {"weight": 1.0}},
    "training": {
        "iterations": 90,
        "objective": {"clip_low": 1e-3, "clip_high": 1e-3},
        "penalty": None,
        "seed": 0,
    },
    "deepspeed": {"zero_optimization": {"stage": 0}},
}


def make_run(
    run_dir,
    *,
    iterations=90,
    total=None,
    prompts=None,
    every=10,
    evaluate=True,
    sets=(0, 30, 60, 90),
    summary=True,
    **samples,
):
    """Write a whole run directory and return its path; `samples` goes to write_samples."""
    run_dir.mkdir(parents=True, exist_ok=True)
    total, source = total or iterations, random.Random(1)
    config = {**CONFIG, "training": {**CONFIG["training"], "iterations": total}}
    (run_dir / "config.json").write_text(json.dumps(config))
    rows = [metrics_row(iteration, total, source) for iteration in range(1, iterations + 1)]
    for row in rows:
        if evaluate and row["iteration"] % every == 0:
            row["eval/reward"] = row["eval/ocr"] = heldout_reward(row["iteration"], total)
    if evaluate:
        rows.insert(
            0, {"iteration": 0, "eval/reward": heldout_reward(0, total), "time/elapsed": 0.0}
        )
    write_rows(run_dir, rows)
    prompts = prompts if prompts is not None else [f'the word "{word}"' for word in words(32)]
    for iteration in sets:
        write_samples(
            run_dir, iteration, prompts, quality=0.55 + 0.4 * iteration / max(1, total), **samples
        )
    if summary:
        content = {
            "base_reward": heldout_reward(0, total),
            "tuned_reward": heldout_reward(iterations, total),
            "minutes": 9.4,
            "iterations": iterations,
            "images": 432 * iterations,
            "model": "tiny-flux",
            "device": "CPU, 2 threads",
            "versions": {"tempflow": "0.1.0", "torch": "2.13.0"},
        }
        (run_dir / "summary.json").write_text(json.dumps(content))
    return run_dir


@pytest.fixture
def run_factory(tmp_path):
    """make_run with a fresh directory: run_factory(name="run", **options)."""
    return lambda name="run", **options: make_run(tmp_path / name, **options)


@pytest.fixture
def sample_writer():
    return write_samples


@pytest.fixture
def row_writer():
    return write_rows
