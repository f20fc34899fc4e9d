"""Print an estimate, and proposed changes, as tables."""

from __future__ import annotations

import json
import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tempflow.errors import counted
from tempflow.estimate.disk import Disk
from tempflow.estimate.estimate import Estimate
from tempflow.estimate.fitting import Step
from tempflow.estimate.item import Item
from tempflow.estimate.memory import Memory
from tempflow.run.console import duration

NAMES = {
    "rollout": "rollout",
    "decode": "decoding",
    "reference": "reference policy",
    "old policy": "old policy, for later parts",
    "training": "training (with backward)",
    "audit": "audit of the suffix",
    "evaluation": "evaluation",
}
LARGEST = 3  # resident items that are named if a run does not fit


def show(estimate: Estimate, output: Console | None = None) -> None:
    """Print memory, costs and disk; if the run does not fit, also the keys of its largest items.

    Args:
        estimate: what to print.
        output: where to; None: stdout.
    """
    # In a file or pipe rich would assume 80 columns, which breaks the lines of the tables.
    out = output or Console(highlight=False, width=None if Console().is_terminal else 120)
    share = (
        ""
        if estimate.trained == estimate.parameters
        else f", {amount(estimate.trained)} of them trained"
    )
    out.print(
        f"[bold]{escape(estimate.model)}[/] on {counted(estimate.gpus, 'GPU')} of"
        f" {size(estimate.card)}: transformer of {amount(estimate.parameters)} parameters{share}. 1"
        " GB = 10^9 bytes; no weights were loaded."
    )
    out.print(_memory(estimate))
    _verdict(estimate, out)
    out.print(_costs(estimate))
    out.print(
        f"At {estimate.speed / 1e12:.0f} TFLOP/s per GPU (--peak-tflops x --mfu). Rewards,"
        " communication and waiting are not counted; training assumes that no group has equal"
        " rewards only."
    )
    out.print(_host(estimate))
    out.print(_disk(estimate.disk))


def show_proposal(estimate: Estimate, steps: list[Step], output: Console | None = None) -> None:
    """Print the changes with which a run fits, each with its cost and what the run then needs.

    Args:
        estimate: of the run as it is; if it fits, nothing is printed.
        steps: as `propose` returns them.
        output: where to print; None: stdout.
    """
    out = output or Console(highlight=False, width=None if Console().is_terminal else 120)
    if estimate.fits:
        return
    out.print(_proposal(estimate, steps[-1].estimate if steps else estimate))
    for step in steps:
        for key, value in step.changes.items():
            out.print(f"  --set '{escape(key)}={escape(json.dumps(value))}'")
        out.print(
            f"      {size(step.estimate.total)}, {spent(step.estimate.seconds)}:"
            f" {escape(step.cost)}"
        )
    out.print(
        "Not tried, because they change the purpose of the run: the model, rollout.height and"
        " width, prompts, seeds and children."
    )


def _proposal(before: Estimate, after: Estimate) -> str:
    """The line above the proposed changes; both are the same where none saves memory."""
    card = size(before.card)
    if after.fits:
        barely = "" if after.has_room else "barely "
        verdict = f"[bold]It {barely}fits {card} with these changes[/]"
    elif after is before:
        return f"[bold]No change that the dry run knows makes it fit {card}[/], or smaller."
    else:
        verdict = (
            f"[bold]No changes that the dry run knows make it fit {card}[/]. These come nearest"
        )
    return f"{verdict} (with the memory and the time of an iteration up to each of them):"


def _memory(estimate: Estimate) -> Table:
    table = _table("Memory of each GPU", "bytes decided by")
    memory = estimate.memory
    for item in memory.resident:
        _row(table, item)
    table.add_section()
    largest = max(memory.moments, key=lambda item: item.bytes)
    # Only the largest moment adds to the total; the others are shown dimmed.
    for item in memory.moments:
        _row(table, item, "+ " if item is largest else "", "" if item is largest else "dim")
    table.add_section()
    table.add_row(
        "[bold]total, with the largest of the moments",
        f"[bold]{size(memory.running)}",
        f"of {size(estimate.card)}",
    )
    if memory.embedding:
        keys = "data.embedding_cache, model.offload_text_encoders, model.dtype"
        table.add_row("before, while prompts are embedded", size(memory.embeds), keys)
    return table


def _verdict(estimate: Estimate, out: Console) -> None:
    for name in estimate.memory.unknown:
        out.print(
            f"[bold yellow]Not counted[/]: the model of reward {escape(name)}, which uses the same"
            " GPU; its size is unknown."
        )
    left = estimate.card - estimate.total
    if estimate.fits and not estimate.has_room:
        out.print(
            f"[bold yellow]Barely fits[/]: {size(left)} left, but fragmentation and NCCL's buffers"
            " are not counted."
        )
    elif estimate.fits:
        out.print(
            f"[bold green]Fits[/]: {size(left)} left for fragmentation and NCCL's buffers, which"
            " are not counted."
        )
    else:
        out.print(f"[bold red]Does not fit[/]: {size(-left)} too much. Largest items:")
        for item in _largest(estimate.memory):
            out.print(f"  {size(item.bytes)}  {escape(item.name)}: {escape(item.keys)}")
        out.print(
            "Change these keys, use more or larger GPUs (--gpus, --card-gb), or reduce"
            " rollout.height, width or frames."
        )


def _largest(memory: Memory) -> list[Item]:
    """The largest items of the time at which the GPU holds most."""
    # Whichever time decides the total: embedding the prompts, or training.
    if memory.embeds > memory.running:
        return sorted(memory.embedding, key=lambda item: -item.bytes)[:LARGEST]
    resident = sorted(memory.resident, key=lambda item: -item.bytes)[:LARGEST]
    return [*resident, max(memory.moments, key=lambda item: item.bytes)]


def _costs(estimate: Estimate) -> Table:
    table = Table(title="An iteration", title_justify="left", title_style="bold")
    table.add_column("phase", no_wrap=True)
    for name in ("forwards", "on the busiest GPU", "TFLOP each", "time"):
        table.add_column(name, justify="right")
    for phase in estimate.phases:
        name = NAMES[phase.name] + ("" if phase.share == 1 else f", every {round(1 / phase.share)}")
        # An integer beyond 10^308 cannot be divided by a float.
        each = f"{min(phase.flops, 10**300) / 1e12:.3g}"
        table.add_row(
            name, grouped(phase.forwards), grouped(phase.busiest), each, spent(phase.seconds)
        )
    table.add_section()
    table.add_row("[bold]average iteration", "", "", "", f"[bold]{spent(estimate.seconds)}")
    return table


def _host(estimate: Estimate) -> Table:
    table = _table("Host memory of each process", "decided by")
    memory = estimate.memory
    for item in memory.host:
        _row(table, item)
    table.add_section()
    each = sum(item.bytes for item in memory.host)
    for name, single in (("while it trains, at most", each), ("while it loads", memory.start)):
        machine = f"{estimate.gpus} processes on one machine: {size(single * estimate.gpus)}"
        table.add_row(name, size(single), machine if estimate.gpus > 1 else "")
    return table


def _disk(disk: Disk) -> Table:
    table = _table("Disk under logging.dir", "decided by")
    for item in disk.parts:
        _row(table, item)
    table.add_section()
    table.add_row("a checkpoint", size(disk.checkpoint))
    keys = "checkpoint.every, keep, keep_best; one more while one is being written"
    table.add_row(f"at most at once: {counted(disk.most, 'checkpoint')}", size(disk.total), keys)
    if disk.samples:
        table.add_row(
            "samples of all evaluations, approximately",
            size(disk.samples),
            "eval.every, eval.keep_samples, rollout.frames",
        )
    return table


def _table(title: str, last: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("what", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column(last.removeprefix("bytes "), style="dim", overflow="fold")
    return table


def _row(table: Table, item: Item, sign: str = "", style: str = "") -> None:
    table.add_row(escape(item.name), sign + size(item.bytes), escape(item.keys), style=style)


def spent(seconds: float) -> str:
    """Seconds as text, in milliseconds, seconds, minutes or hours."""
    if seconds > 1e10:
        return "centuries"
    if seconds < 1:
        return f"{1000 * seconds:.2g}ms"
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)


def size(number: int) -> str:
    """Bytes as text, in decimal units; from 10^18 on as a power of ten."""
    if abs(number) >= 10**18:
        return f"10^{int(math.log10(abs(number)))} B"
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(number) >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"


def amount(number: int) -> str:
    """A count as text, in thousands, millions or billions."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def grouped(number: int) -> str:
    """A count with spaces between groups of three digits."""
    return f"{number:,}".replace(",", " ") if number < 10**15 else f"10^{int(math.log10(number))}"
