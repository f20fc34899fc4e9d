"""Sends a tiny test batch through every reward before anything costly, to find rewards that do not
return numbers of the right shape.

The images are plain gray, so NaN is an acceptable answer. A reward that raises at every try is
refused like one that returns the wrong shape, because it must return NaN for an image that it
cannot score.
"""

from __future__ import annotations

from tempflow.errors import UserError
from tempflow.media import plain
from tempflow.rewards.base import BadScores
from tempflow.rewards.fit import applies
from tempflow.rewards.pool import RewardPool
from tempflow.rewards.registry import RewardSpec, check_frames
from tempflow.types import Size

IMAGES = 2  # with 1 image, a reward that returns one number per batch would pass


def probe(
    pool: RewardPool, specs: list[RewardSpec], prompts: list[str], metadata: list[dict], size: Size
) -> None:
    """Let every reward score two gray images.

    Args:
        pool: the run's pool.
        specs: the run's rewards.
        prompts: the prompts that the run will use; each reward gets the first that it applies to.
        metadata: their metadata.
        size: the size of the run's images or videos.

    Raises:
        UserError: for a reward that does not return a number, or NaN, for each image.
    """
    check_frames(specs, size)
    images = plain(IMAGES, size, 128)
    tickets = {}
    for spec in specs:
        fitting = [
            (prompt, entry)
            for prompt, entry in zip(prompts, metadata, strict=True)
            if applies(spec.name, entry)
        ][:IMAGES]
        chosen = (fitting * IMAGES)[:IMAGES]  # one prompt twice, if there is no second one
        if chosen:
            try:
                tickets[spec.name] = pool.submit(
                    images, [p for p, _ in chosen], [e for _, e in chosen], rewards=[spec.name]
                )
            except BadScores as error:  # raised here only with reward_pool.workers 0
                raise UserError(_message(spec.name, str(error))) from None
    pool.gather(list(tickets.values()))
    for name, ticket in tickets.items():
        if ticket.errors:
            raise UserError(_message(name, ticket.errors[name]))


def _message(name: str, error: str) -> str:
    """An error message with the last line of the traceback `error`, and the place in the reward's
    own file where it was raised."""
    lines = error.strip().splitlines()
    cause = lines[-1].removeprefix(f"{BadScores.__module__}.{BadScores.__name__}: ")
    frames = [
        line.strip()
        for line in lines
        if line.startswith('  File "') and "tempflow/rewards/" not in line
    ]
    place = f" ({frames[-1]})" if frames else ""
    return (
        f"rewards.{name}: cannot score a test batch of {IMAGES} plain gray images: {cause}{place}."
        " A reward must return one number for each image, and NaN for one that it cannot score"
    )
