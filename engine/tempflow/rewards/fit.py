"""Which rewards a prompt is for: those of `"rewards": ["ocr"]` in its metadata, or all where it
names none.

A reward is not asked about an image whose prompt is not for it. That is no failure: the image's
total is the weighted sum of the rewards that apply to its prompt.
"""

from __future__ import annotations

import difflib

import numpy as np

from tempflow.errors import UserError, shown
from tempflow.rewards.base import locate
from tempflow.rewards.registry import RewardSpec, build_reward

KEY = "rewards"


def applies(name: str, metadata: dict) -> bool:
    """Whether a prompt is for the reward of that name."""
    return metadata.get(KEY) is None or name in metadata[KEY]


def fits(specs: list[RewardSpec], metadata: list[dict]) -> np.ndarray:
    """Which of R rewards each of P prompts is for, bool [P, R]."""
    return np.array(
        [[applies(spec.name, entry) for spec in specs] for entry in metadata], dtype=bool
    ).reshape(len(metadata), len(specs))


def kinds_of(fitting: np.ndarray) -> np.ndarray:
    """Prompts with the same rewards share a number, int [P]; fitting: bool [P, R], from `fits`."""
    return np.unique(fitting, axis=0, return_inverse=True)[1].reshape(-1)


def check_prompts(
    specs: list[RewardSpec],
    prompts: list[str],
    metadata: list[dict],
    *,
    watched: bool | None = None,
) -> list[str]:
    """Let each reward look once at all prompts that are for it; the first that cannot be used
    raises `UserError`.

    watched: only the rewards that are watched, or only the others; None: all. Returns what they
    tell of the prompts, a line each.
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
    return list(dict.fromkeys(line for line in told if isinstance(line, str)))


def check_asked(specs: list[RewardSpec], metadata: list[dict]) -> None:
    """UserError for a reward that is trained on and that no training prompt is for."""
    for spec in specs:
        if not spec.watched and not any(applies(spec.name, entry) for entry in metadata):
            raise UserError(
                f"rewards.{spec.name}: no prompt of data.train is for it; every one names other"
                f' "{KEY}"'
            )


def _check_names(specs: list[RewardSpec], prompts: list[str], metadata: list[dict]) -> None:
    """UserError for the first prompt whose `rewards` is no list of names of `specs`, or has none
    with a weight in it."""
    known, trained = (
        [spec.name for spec in specs],
        {spec.name for spec in specs if not spec.watched},
    )
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
                f'{locate(prompt, entry)}: "{KEY}" must be a list of names of rewards, got'
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
        if not trained & set(named):
            raise UserError(
                f'{locate(prompt, entry)}: "{KEY}" names only rewards of weight 0, which train'
                " nothing; name another as well"
            )
