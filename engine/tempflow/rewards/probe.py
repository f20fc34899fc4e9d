"""One tiny batch through every reward before anything costly: what it returns is then known to be
numbers of the right shape.

The images are plain gray, so a reward may well answer NaN; what counts is that it answers. One that
raises for every try is refused like one that returns the wrong shape: it must return NaN for an
image that it cannot score.
"""

from __future__ import annotations

from tempflow.errors import UserError
from tempflow.media import plain
from tempflow.rewards.base import BadScores
from tempflow.rewards.fit import applies
from tempflow.rewards.pool import RewardPool
from tempflow.rewards.registry import RewardSpec, check_frames
from tempflow.types import Size

IMAGES = 2  # with one, [1, 1] and a single number would pass for [1] in careless code


def probe(
    pool: RewardPool, specs: list[RewardSpec], prompts: list[str], metadata: list[dict], size: Size
) -> None:
    """UserError for a reward that does not return a number, or NaN, for each image; prompts: those
    that the run will use."""
    check_frames(specs, size)
    images = plain(IMAGES, size, 128)
    tickets = {}
    for spec in specs:
        fitting = [
            (prompt, entry)
            for prompt, entry in zip(prompts, metadata, strict=True)
            if applies(spec.name, entry)
        ][:IMAGES]
        chosen = (fitting * IMAGES)[:IMAGES]
        if chosen:
            try:
                tickets[spec.name] = pool.submit(
                    images, [p for p, _ in chosen], [e for _, e in chosen], rewards=[spec.name]
                )
            except BadScores as error:  # of a reward in this process
                raise UserError(_message(spec.name, str(error))) from None
    pool.gather(list(tickets.values()))
    for name, ticket in tickets.items():
        if ticket.errors:
            raise UserError(_message(name, ticket.errors[name]))


def _message(name: str, error: str) -> str:
    """The error's last line, and where in the reward's own file it was raised."""
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
        " A reward returns one number for each image, NaN for one that it cannot score"
    )
