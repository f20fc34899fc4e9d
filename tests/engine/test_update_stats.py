"""What an update reports: the sums of Python floats in the order of the micro-batches, to the
bit."""

import math
from types import SimpleNamespace

import pytest
import torch

from tempflow.objectives import Seen
from tempflow.training.update_stats import UpdateStats

HIGH = 0.1
NAN = float("nan")


def micro_batch(number, real, ratio=None):
    """Random values of 4 states, 3 children each, of which `real` are no padding."""
    g = torch.Generator().manual_seed(number)
    ratio = 0.8 + 0.4 * torch.rand(4, 3, generator=g) if ratio is None else ratio
    log_prob, rolled = torch.randn(2, 4, 3, generator=g)
    if number == 1:
        log_prob[1, 2] = math.inf
    kl, clipped, loss = torch.rand(3, generator=g)
    units = [f"{number}-{i}" for i in range(4)]
    batch = SimpleNamespace(real=real, units=units, log_prob_rollout=rolled)
    return batch, Seen(ratio, log_prob, kl, clipped), loss


def by_floats(batches):
    """(sums by name, ends of the ratios, broken units), one value at a time."""
    sums, least, most, worst, broken = (
        dict.fromkeys(("loss", "kl", "gap"), 0.0),
        math.inf,
        -math.inf,
        0.0,
        [],
    )
    for batch, seen, loss in batches:
        sums["loss"] += loss.item()
        sums["kl"] += seen.kl.item() * batch.real
        finite = seen.log_prob.isfinite().all(1)[: batch.real].tolist()
        broken += [unit for unit, good in zip(batch.units, finite, strict=False) if not good]
        if batch.real:
            ratio = seen.ratio[: batch.real]
            least, most = min(least, ratio.min().item()), max(most, ratio.max().item())
            worst = max(worst, (ratio - 1).abs().max().item())
            gap = (seen.log_prob - batch.log_prob_rollout)[: batch.real].abs().mean().item()
            sums["gap"] += gap * batch.real
    return sums, least, most, worst, broken


@pytest.mark.parametrize("reals", [[4, 3, 2, 4], [0, 1], [0]])
def test_sums_are_those_of_python_floats(reals):
    batches = [micro_batch(n, real) for n, real in enumerate(reals)]
    stats, states = UpdateStats(HIGH), max(sum(reals), 1)
    for batch, seen, loss in batches:
        stats.add(batch, seen, loss, first=True)
    found, (sums, least, most, worst, broken) = stats.reduced(), by_floats(batches)
    assert (found["loss"], found["kl"]) == (sums["loss"], sums["kl"] / states)
    assert (found["ratio/min"], found["ratio/max"]) == (least, most)
    assert found["ratio/max_dev"] == worst and stats.broken == broken
    assert found.get("mismatch/log_prob", 0.0) in (sums["gap"] / states, math.inf)
    assert found["forwards"] == sum(reals)


def test_no_number_is_a_deviation_but_no_end():
    stats = UpdateStats(HIGH)
    for number, value in enumerate((1.5, NAN, 0.5)):
        stats.add(*micro_batch(number, 4, torch.full((4, 3), value)), first=False)
    found = stats.reduced()
    assert math.isnan(found["ratio/max_dev"])
    assert (found["ratio/min"], found["ratio/max"]) == (0.5, 1.5)
