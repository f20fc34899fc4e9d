"""Train: deepspeed engine/train.py --config configs/tiny_ocr.json [--set section.key=value ...] [--resume | --dry-run]"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace

from tempflow import cli
from tempflow.arguments import path, positive
from tempflow.config import Config, load_config
from tempflow.data.prompts import PromptOrder, check_unchanged, digests, load_prompts
from tempflow.errors import UserError, note
from tempflow.profiling import Profile
from tempflow.rewards import check_asked, check_prompts, check_watched, parse_rewards
from tempflow.run import directory
from tempflow.run.environment import check_gpu
from tempflow.types import Size


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Align a flow-matching text-to-image model with TempFlow-GRPO.")
    parser.add_argument("--config", type=path, required=True, help="JSON config file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a config key")
    parser.add_argument("--resume", action="store_true", help="continue the run directory from its newest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the memory and time a run needs; load and write nothing")
    dry = parser.add_argument_group("with --dry-run")
    dry.add_argument("--gpus", type=positive, default=1, metavar="N", help="GPUs of the run")
    dry.add_argument("--mfu", type=float, default=0.4, help="share of the peak speed that the model's operations reach")
    dry.add_argument("--card-gb", type=float, default=80.0, metavar="GB", help="memory of a GPU, in 10^9 bytes")
    dry.add_argument("--peak-tflops", type=float, default=989.0, metavar="TFLOPS", help="its peak speed; 989: H100, bf16, dense")
    parser.add_argument("--profile", metavar="START:STOP", help="CUDA profiler on from iteration START to before STOP")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_args()


def checked_inputs(config: Config, *, dry: bool = False):
    """Everything that can be found wrong without loading a model: prompts, rewards, the checkpoint's folder, sizes.

    dry: the folder may hold no more than a description of the model.
    """
    directory.check_place(config)
    specs = parse_rewards(config.rewards)
    train = load_prompts(config.data.train, "data.train")
    heldout = load_prompts(config.data.heldout, "data.heldout") if config.data.heldout else []
    check_watched(specs, evaluated=bool(heldout and config.eval.every))
    told = []
    for kind, prompts in ((False, train + heldout), (True, heldout)):
        told += check_prompts(specs, [p.text for p in prompts], [p.metadata for p in prompts], watched=kind)
    check_asked(specs, [p.metadata for p in train])
    PromptOrder(len(train), config.data.prompts_per_iteration, config.training.seed)
    cli.quiet_libraries()
    from tempflow.config.deepspeed import check_deepspeed
    from tempflow.models import check_checkpoint, check_model, check_size, check_text_length
    from tempflow.models.lora import read_adapters

    check_model(config.model.path)
    check_text_length(config.model.path, config.model.max_sequence_length)
    if config.model.lora and config.model.lora.start:
        read_adapters(config.model.lora)
    check_size(config.model.path, Size(config.rollout.height, config.rollout.width))
    check_deepspeed(config.deepspeed)
    check_checkpoint(config.model.path, description=dry)
    for line in told:
        note(line)
    return specs, train, heldout


def dry_run(args: argparse.Namespace) -> int:
    """What the run will need, from JSON files alone; a run's own checks come first."""
    finite = all(math.isfinite(value) and value > 0 for value in (args.mfu, args.card_gb, args.peak_tflops))
    if not finite or args.mfu > 1:
        raise UserError("--mfu: above 0, at most 1; --card-gb, --peak-tflops: above 0")
    config = load_config(args.config, args.set)
    cli.quiet_libraries()
    from tempflow.estimate import estimate, local_model, show

    asked, config.model.path = config.model.path, local_model(config.model.path)  # configs of some hub models are kept here
    _, train, _ = checked_inputs(config, dry=True)
    result = estimate(config, gpus=args.gpus, mfu=args.mfu, card_gb=args.card_gb, peak_tflops=args.peak_tflops, prompts=len(train))
    if int(os.environ.get("RANK", 0)) == 0:
        show(replace(result, model=asked))
    return 0


def main() -> int:
    args = parse_args()
    if args.dry_run:
        return dry_run(args)
    profile = Profile(args.profile)
    config = load_config(args.config, args.set)
    if args.resume:
        directory.find_modules(directory.path_of(config))
    specs, train, heldout = checked_inputs(config)

    from tempflow.checkpoints.load import read_state
    from tempflow.config.deepspeed import check_machine
    from tempflow.estimate import check_room, disk_of
    from tempflow.models.attention import check_attention
    from tempflow.run.report import write_report
    from tempflow.training.engine import dtypes
    from tempflow.training.loop import train as train_run
    from tempflow.training.signals import StopSignal

    check_gpu()
    check_attention(config.model.attention_backend, config.model.path, dtypes(config))
    check_machine(config.deepspeed)
    stop = StopSignal().install()
    with directory.claim_run(config, args.resume, lambda: check_room(config, disk_of(config))) as (run_dir, resume_from):
        if resume_from:
            check_unchanged(read_state(resume_from).get("prompts", {}), digests(train, heldout[: config.eval.prompts]))
        train_run(config, run_dir, resume_from, train, heldout, specs, stop=stop, report=write_report, profile=profile)
    return 0


if __name__ == "__main__":
    cli.run(main)
