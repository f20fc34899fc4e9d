"""Which rewards apply to a prompt: those that its metadata name, as in `"rewards": ["ocr"]`, or all
rewards if it names none.

A reward is not asked to score an image if it does not apply to the image's prompt. This is not a
failure: the image's total is the weighted sum of the rewards that do apply.
"""

from __future__ import annotations

import difflib

import numpy as np

from tempflow.errors import UserError, shown
from tempflow.rewards.base import locate
from tempflow.rewards.registry import RewardSpec, build_reward

KEY = "rewards"


def applies(name: str, metadata: dict) -> bool:
    """Whether the reward `name` applies to the prompt with this metadata."""
    return metadata.get(KEY) is None or name in metadata[KEY]


def fits(specs: list[RewardSpec], metadata: list[dict]) -> np.ndarray:
    """Which of R rewards apply to each of P prompts, bool [P, R]."""
    return np.array(
        [[applies(spec.name, entry) for spec in specs] for entry in metadata], dtype=bool
    ).reshape(len(metadata), len(specs))  # np.array makes [0] of no prompts, not [0, R]


def kinds_of(fitting: np.ndarray) -> np.ndarray:
    """The kind of each prompt, int [P]: prompts with the same rewards share a number. fitting: bool
    [P, R], from `fits`."""
    # reshape: NumPy 2.0 returns the inverse as [P, 1], other versions as [P]
    return np.unique(fitting, axis=0, return_inverse=True)[1].reshape(-1)


def check_prompts(
    specs: list[RewardSpec],
    prompts: list[str],
    metadata: list[dict],
    *,
    watched: bool | None = None,
) -> list[str]:
    """Let each reward check the prompts that it applies to.

    Args:
        specs: the run's rewards.
        prompts: n texts.
        metadata: n tables.
        watched: True: only the rewards of weight 0; False: only the others; None: all.

    Returns:
        What the rewards report about the prompts, a line each.

    Raises:
        UserError: for the first prompt that a reward cannot use.
    """
    _check_names(specs, prompts, metadata)
    told = []
    for spec in (spec for spec in specs if watched in (None, spec.watched)):
        chosen = [
            (prompt, entry)
            for prompt, entry in zip(prompts, metadata, strict=True)
            if applies(spec.name, entry)
        ]
        reward = build_reward(spec.name, spec.options, spec.type)
        told.append(
            reward.check_prompts([prompt for prompt, _ in chosen], [entry for _, entry in chosen])
        )
    # Two entries of one type report the same line. A user's check_prompts may return anything.
    return list(dict.fromkeys(line for line in told if isinstance(line, str)))


def check_asked(specs: list[RewardSpec], metadata: list[dict]) -> None:
    """UserError for a reward with a weight that applies to no training prompt."""
    for spec in specs:
        if not spec.watched and not any(applies(spec.name, entry) for entry in metadata):
            raise UserError(
                f"rewards.{spec.name}: it applies to no prompt of data.train, since every one names"
                f' other "{KEY}"; add it to some prompts, or remove it from the config'
            )


def _check_names(specs: list[RewardSpec], prompts: list[str], metadata: list[dict]) -> None:
    """UserError for the first prompt whose "rewards" is not a list of names of `specs`, or names
    only rewards of weight 0."""
    known = [spec.name for spec in specs]
    trained = {spec.name for spec in specs if not spec.watched}
    for prompt, entry in zip(prompts, metadata, strict=True):
        named = entry.get(KEY)
        if named is None:
            continue
        if (
            not isinstance(named, list)
            or not named
            or not all(isinstance(name, str) for name in named)
        ):
            raise UserError(
                f'{locate(prompt, entry)}: "{KEY}" must be a list of reward names, got'
                f" {shown(named)}"
            )
        for name in named:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise UserError(
                    f'{locate(prompt, entry)}: "{KEY}" names {shown(name)}{hint} This run has'
                    f" {', '.join(known)}"
                )
        # Its total would be 0 for every image: a zero-advantage group in each iteration.
        if not trained & set(named):
            raise UserError(
                f'{locate(prompt, entry)}: "{KEY}" names only rewards of weight 0, which are not'
                " trained on; name another one as well"
            )
