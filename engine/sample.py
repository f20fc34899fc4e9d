"""Prompts to pictures, base and tuned side by side: python engine/sample.py --run runs/tiny_ocr --out pictures"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tempflow import cli
from tempflow.run import outputs

GAP = 4


def parse_args() -> argparse.Namespace:
    from tempflow.arguments import add_checkpoint_arguments, filled, path, positive, seed, steps

    parser = argparse.ArgumentParser(description="Draw the same prompts and noise with the base and the tuned model.")
    add_checkpoint_arguments(parser)
    parser.add_argument("--out", type=path, required=True, help="folder for the pictures; must not exist, or be empty")
    parser.add_argument("--prompt", type=filled, action="append", help="a prompt; may be given again (default: held-out prompts)")
    parser.add_argument("--prompts", type=path, help="prompt file")
    parser.add_argument("--count", type=positive, default=16, help="prompts used, from the top of a file")
    parser.add_argument("--num-steps", type=steps, help="ODE steps (default: the run's eval.num_steps)")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise")
    return parser.parse_args()


def chosen_prompts(args, config):
    from tempflow.data.prompts import load_prompts, typed_prompts
    from tempflow.errors import UserError

    if args.prompt:
        return typed_prompts(args.prompt, "--prompt")
    file = args.prompts or config.data.heldout
    if not file:
        raise UserError("--prompt or --prompts: the run has no held-out prompts; name some")
    return load_prompts(file, "--prompts" if args.prompts else "data.heldout")[: args.count]


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two images [H, W, 3] with a white gap between them."""
    gap = np.full((left.shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def main() -> int:
    cli.quiet_libraries()
    args = parse_args()
    with outputs.new_folder(args.out, args.run) as draft:
        written = draw_pairs(args, draft)
    print(written)
    return 0


def draw_pairs(args: argparse.Namespace, draft: Path) -> str:
    """Write the pairs into `draft`; returns what to say of them."""
    from PIL import Image
    from rich.progress import Progress

    from tempflow.checkpoints import load
    from tempflow.media import still
    from tempflow.models.embeddings import open_policy
    from tempflow.run import evaluation
    from tempflow.run.environment import choose_device
    from tempflow.types import Size

    chosen = load.load_tuned(args.run, args.checkpoint, args.weights)
    config, r = chosen.config, chosen.config.rollout
    prompts = chosen_prompts(args, config)
    policy, embeddings = open_policy(config, prompts, choose_device())
    sampler = policy.at(Size(r.height, r.width), config.eval_guidance())
    steps = args.num_steps or config.eval.num_steps or r.num_steps
    pictures, missing = [], 0
    with Progress(transient=True) as progress:
        for name in ("base", "tuned"):
            if name == "tuned":
                load.apply(chosen, policy)
            task = progress.add_task(name, total=len(prompts))
            drawn = evaluation.draw(
                sampler, embeddings, prompts, list(range(len(prompts))), num_steps=steps, micro_batch=r.micro_batch,
                decode_batch=r.decode_batch, seed=args.seed, advance=lambda n, task=task: progress.advance(task, n),
            )  # fmt: skip
            parts = [(images, finite) for _, images, finite in drawn]
            pictures.append(np.concatenate([images for images, _ in parts]))
            missing += sum(int((~finite).sum()) for _, finite in parts)
    pairs = [beside(still(base), still(new)) for base, new in zip(*pictures, strict=True)]
    for n, pair in enumerate(pairs):
        Image.fromarray(pair).save(draft / f"{n:04d}.png")
    Image.fromarray(np.concatenate(pairs)).save(draft / "all.png")
    (draft / "prompts.txt").write_text("".join(f"{n:04d}.png\t{p.text}\n" for n, p in enumerate(prompts)), encoding="utf-8")
    written = f"{len(pairs)} pairs in {args.out}: left base, right iteration {chosen.iteration} ({chosen.which} weights)"
    return written + (f"\nwarning: {missing} images hold NaN or infinity; a checkerboard stands for each" if missing else "")


if __name__ == "__main__":
    cli.run(main)
