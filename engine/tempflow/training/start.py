"""The start of a training run: all checks in order, from the config to the machine, then the
training itself.

Modules that need torch are imported after the checks that do not, so that a mistake in a config is
reported at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from tempflow import cli
from tempflow.config import Config, load_config
from tempflow.data.prompts import PromptOrder, check_unchanged, digests, load_prompts
from tempflow.errors import note
from tempflow.profiling import Profile
from tempflow.rewards import (
    RewardSpec,
    check_asked,
    check_frames,
    check_prompts,
    check_watched,
    parse_rewards,
    without_maps,
)
from tempflow.run import directory
from tempflow.run.environment import check_gpu
from tempflow.types import Example


def checked_inputs(
    config: Config, *, dry: bool = False
) -> tuple[list[RewardSpec], list[Example], list[Example]]:
    """Validate everything that needs no loaded model: prompts, rewards, the model's folder, sizes.

    Args:
        config: a checked config.
        dry: for a dry run, which needs only the configs in the model's folder, not the weights.

    Returns:
        The rewards, the training prompts and the held-out prompts.

    Raises:
        UserError: a check fails.
    """
    # Cheap checks first: files and prompts before anything that imports torch.
    directory.check_place(config)
    specs = parse_rewards(config.rewards)
    train = load_prompts(config.data.train, "data.train")
    heldout = load_prompts(config.data.heldout, "data.heldout") if config.data.heldout else []
    check_watched(specs, evaluated=bool(heldout and config.eval.every))
    told = []
    # Watched rewards are computed in evaluations only, so they see the held-out prompts alone.
    for kind, prompts in ((False, train + heldout), (True, heldout)):
        told += check_prompts(
            specs, [p.text for p in prompts], [p.for_rewards for p in prompts], watched=kind
        )
    # Not refused: with any reward the advantage is defined, and a config may be tried with another.
    if config.advantage().needs_maps and (line := without_maps(specs)):
        told.append(line)
    if config.training.advantage.get("blind_to") and (line := _few_for_colors(config)):
        told.append(line)
    check_asked(specs, [p.metadata for p in train])
    # Only for its checks.
    PromptOrder(len(train), config.data.prompts_per_iteration, config.training.seed)
    # Before the imports: the libraries read these settings, or warn, when they are imported.
    cli.quiet_libraries()
    from tempflow.config.deepspeed import check_deepspeed
    from tempflow.models import (
        check_checkpoint,
        check_examples,
        check_guidance,
        check_model,
        check_size,
        check_text_length,
    )
    from tempflow.models.lora import read_adapters
    from tempflow.training.shares import check_guided_forwards

    check_model(config.model.path)
    check_examples(config.model.path, train + heldout)
    check_text_length(config.model.path, config.model.max_sequence_length)
    if config.model.lora and config.model.lora.start:
        read_adapters(config.model.lora)
    check_size(config.model.path, config.rollout.size)
    check_frames(specs, config.rollout.size)
    check_guidance(config.model.path, config.rollout.guidance_scale_2)
    check_deepspeed(config.deepspeed)
    check_guided_forwards(config)
    check_checkpoint(config.model.path, description=dry)
    for line in told:
        note(line)
    return specs, train, heldout


def _few_for_colors(config: Config) -> str | None:
    """A line for people where iterations have too few images for a fit to their colors."""
    from tempflow.advantages.spatial import FEWEST
    from tempflow.sampling.layout import Layout, iteration_units

    plan, prompts = config.plan(), config.data.prompts_per_iteration
    units = iteration_units([0], plan.seeds)
    slots = Layout(units, [plan.rows(unit, 0) for unit in units]).slots
    groups = len(set(slots.groups(config.advantage().over).tolist()))
    if prompts * (len(slots) - groups) >= FEWEST:
        return None
    return (
        f"training.advantage.blind_to: an iteration has {prompts * len(slots)} images in"
        f" {prompts * groups} groups, too few to fit six numbers to, so colors stay in the"
        f" advantages; with {FEWEST} more images than groups they do not"
    )


def check_hardware(config: Config) -> None:
    """Refuse a config that this machine or its libraries cannot run. Call after `checked_inputs`.

    Raises:
        UserError: names the key and what is missing.
    """
    from tempflow.config.deepspeed import check_machine
    from tempflow.models.attention import check_attention
    from tempflow.models.quantized import check_library
    from tempflow.training.precision import dtypes, shares_base
    from tempflow.training.shares import guides_in_one

    check_gpu()
    check_attention(
        config.model.attention_backend, config.model.path, dtypes(config), guides_in_one(config)
    )
    check_machine(config.deepspeed)
    check_library(config.model.quantize)
    shares_base(config)  # raises if the dtypes do not allow what the config asks for


def start(
    config: str | Path | dict,
    *,
    resume: bool = False,
    overrides: Sequence[str] = (),
    profile: str | None = None,
) -> dict:
    """Train a config to the end, or until a signal stops it (a collective).

    Args:
        config: a JSON file, or a table as `load_config` takes it.
        resume: whether to continue from the newest checkpoint of the run directory.
        overrides: `section.key=value` texts.
        profile: the iterations that the CUDA profiler sees, START:STOP.

    Returns:
        "run_dir" (a Path) and the contents of summary.json. On ranks other than 0, and where a
        signal stopped the run, "run_dir" alone.

    Raises:
        UserError: the config, the prompts, the machine or the run directory does not allow the run.
    """
    window = Profile(profile)
    checked = load_config(config, overrides)
    # A resumed run may need the user's modules from the folder that it was started in.
    if resume:
        directory.find_modules(directory.path_of(checked))
    specs, prompts, heldout = checked_inputs(checked)

    from tempflow.checkpoints.load import read_state
    from tempflow.estimate import check_room, disk_of
    from tempflow.run.report import write_report
    from tempflow.training.assemble import train
    from tempflow.training.signals import StopSignal

    check_hardware(checked)
    # The handlers stay installed after the run: a launcher may pass a signal on a second time.
    stop = StopSignal().install()
    with directory.claim_run(checked, resume, lambda: check_room(checked, disk_of(checked))) as (
        run_dir,
        resume_from,
    ):
        # Noise is keyed by a prompt's place in the file, so another file would be another run.
        if resume_from:
            check_unchanged(
                read_state(resume_from).get("prompts", {}),
                digests(prompts, heldout[: checked.eval.prompts]),
            )
        summary = train(
            checked,
            run_dir,
            resume_from,
            prompts,
            heldout,
            specs,
            stop=stop,
            report=write_report,
            profile=window,
        )
    return {"run_dir": run_dir, **(summary or {})}
