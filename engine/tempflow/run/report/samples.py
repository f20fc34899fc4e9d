"""The images of the report: base against tuned for the same prompts and noise, after the condition
image where a prompt brings one, and the way between them."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from tempflow.rewards.quotes import quoted_text
from tempflow.run.report.readings import reading_html
from tempflow.run.report.run import Run, SampleSet, number
from tempflow.run.report.thumbnails import Thumbnails

SHOWN = 24
STRIP_PROMPTS, STRIP_COLUMNS = 6, 8
SAME = 5e-4  # smaller changes of a reward read 0.000


@dataclass
class Pair:
    """One prompt with its item of the base's sample set and of the tuned one's."""

    prompt: str
    base: dict | None
    tuned: dict | None

    @property
    def change(self) -> float | None:
        before, after = (
            number(item.get("reward")) if item else None for item in (self.base, self.tuned)
        )
        return None if before is None or after is None else after - before


def samples_html(run: Run, thumbnails: Thumbnails) -> str:
    """The samples section, "" where no sample set was written."""
    if not run.samples:
        return ""
    base, tuned = run.samples[0], run.samples[-1]
    pairs = match(base, tuned)
    strip = _strip(run, thumbnails)  # first: the budget should go to what is always shown
    cards = [_card(pair, base, tuned, thumbnails) for pair in pairs]
    shown = [card for card in cards if card]
    grid = (
        "grid"
        + (" solo" if tuned is base else "")
        + (" edits" if any(_condition(pair) for pair in pairs) else "")
    )
    more = ""
    if len(shown) > SHOWN:
        more = (
            f'<details class="more"><summary>{len(shown) - SHOWN} more prompts</summary>'
            f'<div class="{grid}">{"".join(shown[SHOWN:])}</div></details>'
        )
    lost = len(cards) - len(shown)
    note = (
        f'<p class="note">{lost} more not included: missing, or left out to keep this file'
        " small.</p>"
        if lost
        else ""
    )
    return (
        f'<section id="samples"><h2>Samples</h2>{_intro(run.things, pairs, base, tuned)}'
        f'<div class="{grid}">{"".join(shown[:SHOWN])}</div>{more}{note}{strip}</section>'
    )


def match(base: SampleSet, tuned: SampleSet) -> list[Pair]:
    """Pairs of the tuned set's items with the base's: same place and prompt (with its condition
    images), else the same prompt elsewhere."""
    if tuned is base:
        return [Pair(str(item.get("prompt", "")), item, None) for item in base.items]
    by_prompt = {_asked(item): item for item in reversed(base.items)}
    pairs = []
    for place, item in enumerate(tuned.items):
        twin = base.items[place] if place < len(base.items) else {}
        if _asked(twin) != _asked(item):
            twin = by_prompt.get(_asked(item))  # type: ignore[assignment]  # looked at only where it is found
        pairs.append(Pair(str(item.get("prompt", "")), twin, item))
    return pairs


def _asked(item: dict) -> tuple[str, str]:
    return str(item.get("prompt")), str(item.get("images"))


def exact_share(sample: SampleSet) -> float | None:
    """Share of images whose OCR reading is the quoted word, None where the set has no readings."""
    marks = [_solved(item) for item in sample.items if _reading(item) is not None]
    return sum(marks) / len(marks) if marks else None


def _intro(things: str, pairs: list[Pair], base: SampleSet, tuned: SampleSet) -> str:
    if tuned is base:
        what = "the model before training" if base.iteration == 0 else f"iteration {base.iteration}"
        return (
            f'<p class="lead">{things.title()} of {what}; no later ones have been written yet.</p>'
        )
    same = all(base.info.get(key) == tuned.info.get(key) for key in ("seed", "num_steps"))
    noise = (
        "the same prompts and initial noise"
        if same
        else "the same prompts, but another seed or step count"
    )
    changes = [pair.change for pair in pairs if pair.change is not None]
    up, down = sum(change > SAME for change in changes), sum(change < -SAME for change in changes)
    count = (
        f" Of {len(changes)} {things} {up} scored higher after training, {down} lower,"
        f" {len(changes) - up - down} the same."
    )
    weights = {"ema": " (averaged weights)", "merge": " (merged weights)"}.get(
        str(tuned.info.get("weights")), ""
    )
    before, after = exact_share(base), exact_share(tuned)
    words = (
        f" Exact words: {before:.0%} before, {after:.0%} after."
        if None not in (before, after)
        else ""
    )
    left = (
        f"From left to right: the condition image, {_title(base)}"
        if any(_condition(pair) for pair in pairs)
        else f"From left to right: {_title(base)}"
    )
    return (
        f'<p class="lead">{left}, {_title(tuned)}{weights}; {noise}. The held-out prompts '
        f"are shown in file order, not picked by result.{count if changes else ''}{words}</p>"
    )


def _title(sample: SampleSet) -> str:
    return "the base model" if sample.iteration == 0 else f"iteration {sample.iteration}"


def _card(pair: Pair, base: SampleSet, tuned: SampleSet, thumbnails: Thumbnails) -> str:
    sides = [
        side(item, sample, pair.prompt, thumbnails, _label(sample))
        for item, sample in ((pair.base, base), (pair.tuned, tuned))
        if item
    ]
    if not all(sides) or not sides:
        return ""
    sides = [*_before(pair, base if pair.tuned is None else tuned, thumbnails), *sides]
    badge = ""
    if pair.change is not None:
        kind = "up" if pair.change > SAME else "down" if pair.change < -SAME else "same"
        badge = f'<span class="change {kind}">{signed(pair.change)}</span>'
    return (
        '<article class="pair"><header><p class="prompt"'
        f' title="{escape(pair.prompt)}">{escape(pair.prompt)}</p>{badge}</header><div'
        f' class="duo">{"".join(sides)}</div></article>'
    )


def _label(sample: SampleSet) -> str:
    return "base" if sample.iteration == 0 else f"iteration {sample.iteration}"


def side(item: dict, sample: SampleSet, prompt: str, thumbnails: Thumbnails, label: str) -> str:
    """An image of a sample set with its label, reward and reading; "" where it is lost."""
    thumbnail = thumbnails.get(sample.folder / str(item["file"]))
    if thumbnail is None:
        return ""
    reading = _reading(item)
    read = "" if reading is None else reading_html(reading, _target(item, prompt), _solved(item))
    row = f'<span class="row"><span class="who">{escape(label)}</span>{_reward(item)}</span>'
    return (
        f"<figure>{_img(thumbnail, f'{label}: {prompt}')}<figcaption>{row}{read}{_parts(item)}"
        "</figcaption></figure>"
    )


def _condition_of(item: dict) -> str | None:
    """The file of an item's condition images."""
    return item["condition"] if isinstance(item.get("condition"), str) else None


def _condition(pair: Pair) -> str | None:
    return _condition_of(pair.tuned or pair.base or {})


def _has_conditions(sample: SampleSet) -> bool:
    return any(_condition_of(item) for item in sample.items)


def _before(pair: Pair, sample: SampleSet, thumbnails: Thumbnails) -> list[str]:
    """A pair's condition images, none where it has none or they are lost."""
    name = _condition(pair)
    thumbnail = thumbnails.get(sample.folder / name) if name else None
    if thumbnail is None:
        return []
    image = _img(thumbnail, f"condition image: {pair.prompt}")
    return [
        f'<figure>{image}<figcaption><span class="row"><span'
        ' class="who">condition</span></span></figcaption></figure>'
    ]


def _img(thumbnail, alt: str) -> str:
    shown = (
        f'<img src="{thumbnail.uri}" width="{thumbnail.width}" height="{thumbnail.height}"'
        f' alt="{escape(alt)}">'
    )
    if not thumbnail.still:
        return shown
    return (
        '<picture><source media="(prefers-reduced-motion: reduce)"'
        f' srcset="{thumbnail.still}">{shown}</picture>'
    )


def _part(item: dict, key: str) -> dict:
    return item[key] if isinstance(item.get(key), dict) else {}


def _reading(item: dict) -> str | None:
    """What OCR read; where it failed its detail says why, which is no reading."""
    reading = _part(item, "details").get("ocr")
    return (
        reading
        if isinstance(reading, str) and number(_part(item, "rewards").get("ocr")) is not None
        else None
    )


def _target(item: dict, prompt: str) -> str:
    given = item.get("ocr_target")
    return given if isinstance(given, str) else quoted_text(prompt)


def _solved(item: dict) -> bool:
    return (number(_part(item, "rewards").get("ocr")) or 0) > 1 - SAME


def _reward(item: dict) -> str:
    value = number(item.get("reward"))
    return (
        '<span class="num failed">failed</span>'
        if value is None
        else f'<span class="num">{value:.3f}</span>'
    )


def _parts(item: dict) -> str:
    """Each reward by name where there is more than one, and what was noted about the image besides
    a reading."""
    rewards, details, read = (
        _part(item, "rewards"),
        _part(item, "details"),
        _reading(item) is not None,
    )
    parts = []
    if len(rewards) > 1:
        parts = [
            f"{name} {'failed' if number(value) is None else format(value, '.3f')}"
            for name, value in rewards.items()
        ]
    parts += [
        f"{name}: {str(value)[:120]}"
        for name, value in details.items()
        if value not in (None, "") and not (read and name == "ocr")
    ]
    return f'<span class="parts">{escape(" · ".join(parts))}</span>' if parts else ""


def _strip(run: Run, thumbnails: Thumbnails) -> str:
    """The first prompts through training, where there are sets between the first and the last."""
    if len(run.samples) < 3:
        return ""
    columns = min(STRIP_COLUMNS, len(run.samples))
    sets = [run.samples[round(n * (len(run.samples) - 1) / (columns - 1))] for n in range(columns)]
    head = '<th scope="col">condition</th>' if _has_conditions(sets[0]) else ""
    head += "".join(
        f'<th scope="col">{"base" if s.iteration == 0 else s.iteration}</th>' for s in sets
    )
    body = "".join(
        f"<tr>{_strip_row(n, sets, thumbnails)}</tr>"
        for n in range(min(STRIP_PROMPTS, len(sets[0].items)))
    )
    return (
        '<h3>Over training</h3><p class="lead">The first prompts, same noise, by iteration.</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Samples over training">'
        f'<table class="strip"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _strip_row(place: int, sets: list[SampleSet], thumbnails: Thumbnails) -> str:
    cells = []
    if _has_conditions(sets[0]):
        item = sets[0].items[place]
        thumbnail = (
            thumbnails.get(sets[0].folder / item["condition"]) if _condition_of(item) else None
        )
        cells.append(f"<td>{_img(thumbnail, 'condition image')}</td>" if thumbnail else "<td></td>")
    for sample in sets:
        item = sample.items[place] if place < len(sample.items) else None  # type: ignore[assignment]  # looked at only where it is found
        thumbnail = (
            thumbnails.get(sample.folder / str(item["file"]), moving=False) if item else None
        )
        alt = f"iteration {sample.iteration}: {item.get('prompt', '')}" if item else ""
        cells.append(
            f"<td>{_img(thumbnail, alt)}{_reward(item)}</td>" if thumbnail else "<td></td>"
        )
    return "".join(cells)


def signed(value: float, digits: int = 3) -> str:
    """+0.310, −0.020, 0.000: with a sign that is as wide as a digit."""
    if abs(value) < 0.5 * 10**-digits:
        return f"{0:.{digits}f}"
    return f"{value:+.{digits}f}".replace("-", "−")
