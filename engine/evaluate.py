"""Rewards of a run's model on held-out prompts: python engine/evaluate.py --run runs/tiny_ocr [--base]"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from tempflow import cli
from tempflow.run import outputs
from tempflow.run.streams import check_result


def parse_args() -> argparse.Namespace:
    from tempflow.arguments import add_checkpoint_arguments, path, positive, steps

    parser = argparse.ArgumentParser(description="Score a run's model on held-out prompts, with fixed noise.")
    add_checkpoint_arguments(parser)
    parser.add_argument("--base", action="store_true", help="score the model before training instead")
    parser.add_argument("--prompts", type=path, help="prompt file (default: the run's held-out prompts)")
    parser.add_argument("--count", type=positive, help="prompts used, from the top of the file (default: as in the run)")
    parser.add_argument("--num-steps", type=steps, help="ODE steps (default: the run's eval.num_steps)")
    parser.add_argument("--out", type=path, help="folder for pictures and samples.json; must not exist, or be empty")
    return parser.parse_args()


def main() -> int:
    cli.quiet_libraries()
    args = parse_args()
    with outputs.new_folder(args.out, args.run) if args.out else nullcontext() as draft:
        score(args, draft)
    check_result()
    return 0


def score(args: argparse.Namespace, draft: Path | None) -> None:
    """Evaluate, print the numbers, and write the pictures into `draft` if there is one."""
    from rich.console import Console
    from rich.progress import Progress

    from tempflow.checkpoints import load
    from tempflow.data.prompts import load_prompts
    from tempflow.errors import UserError, note
    from tempflow.models.embeddings import open_policy
    from tempflow.rewards import RewardPool, check_prompts, parse_rewards, probe
    from tempflow.run import evaluation
    from tempflow.run.directory import find_modules, read_config
    from tempflow.run.environment import choose_device
    from tempflow.run.failures import check_failed
    from tempflow.run.means import with_error
    from tempflow.types import Size

    chosen = None if args.base else load.load_tuned(args.run, args.checkpoint, args.weights)
    config = chosen.config if chosen else read_config(args.run)
    file = args.prompts or config.data.heldout
    if not file:
        raise UserError("--prompts: the run has no held-out prompts; name a prompt file")
    prompts = load_prompts(file, "--prompts" if args.prompts else "data.heldout")[: args.count or config.eval.prompts]
    find_modules(args.run)
    specs = parse_rewards(config.rewards)
    texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    for line in check_prompts(specs, texts, metadata):
        note(line)
    policy, embeddings = open_policy(config, prompts, choose_device())
    if chosen:
        load.apply(chosen, policy)
    steps = args.num_steps or config.eval.num_steps or config.rollout.num_steps
    r = config.rollout
    sampler = policy.at(Size(r.height, r.width), config.eval_guidance())
    with RewardPool(specs, **config.reward_pool.pool()) as scorers, Progress(transient=True) as progress:
        probe(scorers, specs, texts, metadata, sampler.size)
        task = progress.add_task("sampling", total=len(prompts))
        drawn = evaluation.draw(
            sampler, embeddings, prompts, list(range(len(prompts))), num_steps=steps, micro_batch=r.micro_batch,
            decode_batch=r.decode_batch, advance=lambda n: progress.advance(task, n),
        )  # fmt: skip
        scored = evaluation.evaluate(scorers, specs, prompts, drawn, keep=len(prompts) if draft else 0)
        check_failed("this evaluation", *scored.counts(), config.reward_pool.max_failed, scorers.last_error)
    which = f"iteration {chosen.iteration}, {chosen.which} weights" if chosen else "base"
    facts = {"iteration": chosen.iteration if chosen else 0, "num_steps": steps, "seed": evaluation.EVAL_SEED,
             "weights": chosen.which if chosen else "base"}  # fmt: skip
    total, alone = scored.mean(), scored.means()
    result = {**{name: mean.value for name, mean in alone.items()}, **facts, "prompts": len(prompts), "reward": total.value,
              "stderr": total.stderr, "scored": total.scored, "failed": total.failed,
              "rewards": {name: asdict(mean) for name, mean in alone.items()}}  # fmt: skip
    reward = f"reward {with_error(total.value, total.stderr)} on {total.scored} of {len(prompts)} prompts ({total.failed} failed)"
    Console(highlight=False, stderr=True, soft_wrap=True).print(f"{which}: {reward}, {steps} steps")
    print(json.dumps(result, allow_nan=False), flush=True)
    if draft:
        evaluation.write_samples(draft, scored, prompts, facts)


if __name__ == "__main__":
    cli.run(main)
