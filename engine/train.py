"""Train: deepspeed engine/train.py --config configs/tiny_ocr.json [--set section.key=value ...] [--resume]"""

from __future__ import annotations

import argparse

from tempflow import cli
from tempflow.config import Config, load_config
from tempflow.profiling import Profile
from tempflow.prompts import PromptOrder, load_prompts
from tempflow.rewards import check_prompts, parse_rewards


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Align a flow-matching text-to-image model with TempFlow-GRPO.")
    parser.add_argument("--config", required=True, help="JSON config file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a config key")
    parser.add_argument("--resume", action="store_true", help="continue the run directory from its newest checkpoint")
    parser.add_argument("--profile", metavar="START:STOP", help="CUDA profiler on from iteration START to before STOP")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_args()


def checked_inputs(config: Config):
    """Everything that can be found wrong without loading a model: prompts, rewards, the checkpoint's folder, sizes."""
    specs = parse_rewards(config.rewards)
    train = load_prompts(config.data.train, "data.train")
    heldout = load_prompts(config.data.heldout, "data.heldout") if config.data.heldout else []
    check_prompts(specs, [p.text for p in train + heldout], [p.metadata for p in train + heldout])
    PromptOrder(len(train), config.data.prompts_per_iteration, config.training.seed)
    cli.quiet_libraries()
    from tempflow.policy import check_model, check_size

    check_model(config.model.path)
    check_size(config.model.path, config.rollout.height, config.rollout.width)
    return specs, train, heldout


def main() -> int:
    args = parse_args()
    profile = Profile(args.profile)
    config = load_config(args.config, args.set)
    specs, train, heldout = checked_inputs(config)

    from tempflow.report import write_report
    from tempflow.trainer.loop import Trainer
    from tempflow.trainer.process import StopSignal
    from tempflow.trainer.start import claim_run

    stop = StopSignal().install()
    run_dir, resume_from = claim_run(config, args.resume)
    trainer = Trainer(config, run_dir, train, heldout, specs, stop, write_report, profile)
    trainer.run(resume_from)
    return 0


if __name__ == "__main__":
    cli.run(main)
