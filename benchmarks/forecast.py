"""Forecasts what a benchmark of several variants will need, by the dry run's arithmetic, without
loading anything."""

from __future__ import annotations

from dataclasses import dataclass

from bench import changed

from tempflow.config import Config
from tempflow.estimate import estimate
from tempflow.estimate.memory import Memory

MFU = 0.4  # the share of a matrix product's speed that transformers of this size reach, roughly
SPARE = 0.5e9  # bytes that PyTorch's allocator cannot use
TIMED = ("rollout", "decode", "reference", "training")


@dataclass(frozen=True)
class Forecast:
    """What a benchmark needs.

    seconds: of one iteration of every variant, without rewards.
    bytes: most memory on the device.
    """

    seconds: float
    bytes: int


def forecast(
    configs: list[Config], flops_per_s: float, engines: int = 1, per_child: list[bool] | None = None
) -> Forecast:
    """Forecast for variants that share `engines` loaded engines. What a variant holds in addition
    (float8 copies, graphs) is counted until the end.

    per_child: the variants that train with a forward for every child.
    """

    def of(config: Config):
        embedded = changed(config, data={"embedding_cache": "unused"})
        return estimate(embedded, mfu=MFU, peak_tflops=flops_per_s / 1e12)

    made = [of(config) for config in configs]
    trained = [
        of(_each_a_state(config)) if alone else one
        for config, one, alone in zip(configs, made, per_child or [False] * len(made))
    ]
    seconds = sum(
        phase.seconds for each in made for phase in each.phases if phase.name in TIMED[:2]
    )
    seconds += sum(
        phase.seconds for each in trained for phase in each.phases if phase.name in TIMED[2:]
    )
    resident = [_resident(each.memory) for each in made]
    extra = sum(size - min(resident) for size in resident)
    moment = max(item.bytes for each in trained for item in each.memory.moments)
    return Forecast(seconds, engines * min(resident) + extra + moment)


def _each_a_state(config: Config) -> Config:
    """A config whose training forwards as many states as this config has children."""
    siblings = config.plan().children
    return changed(
        config,
        data={"prompts_per_iteration": config.data.prompts_per_iteration * siblings},
        training={"micro_batch": config.training.states * siblings},
    )


def _resident(memory: Memory) -> int:
    return sum(item.bytes for item in memory.resident)
