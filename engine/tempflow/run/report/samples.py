"""The samples of the report: each prompt's condition image, if any, and its images before and after
training from the same noise; below them the first prompts over the course of training."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from tempflow.rewards.quotes import quoted_text
from tempflow.run.report.readings import reading_html
from tempflow.run.report.run import Run, SampleSet, number
from tempflow.run.report.thumbnails import Thumbnails

SHOWN = 24  # prompts; more are behind a fold
STRIP_PROMPTS, STRIP_COLUMNS = 6, 8  # of the table over the course of training
SAME = 5e-4  # a smaller change of a reward reads 0.000 and counts as none


@dataclass
class Pair:
    """A prompt with its item in the base's sample set and in the tuned model's."""

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
    # The first set is the base's unless the run had no evaluation before training.
    base, tuned = run.samples[0], run.samples[-1]
    pairs = match(base, tuned)
    # First, though shown last: thumbnails have a budget, and the strip is not behind a fold.
    strip = _strip(run, thumbnails)
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
    """Pair the tuned set's items with the base's: by place if prompt and condition images agree,
    else by prompt and condition images. With one set there are items of the base alone."""
    if tuned is base:
        return [Pair(str(item.get("prompt", "")), item, None) for item in base.items]
    # reversed: of equal prompts the first is found.
    by_prompt = {_asked(item): item for item in reversed(base.items)}
    pairs = []
    for place, item in enumerate(tuned.items):
        twin: dict | None = base.items[place] if place < len(base.items) else None
        if twin is None or _asked(twin) != _asked(item):
            twin = by_prompt.get(_asked(item))
        pairs.append(Pair(str(item.get("prompt", "")), twin, item))
    return pairs


def _asked(item: dict) -> tuple[str, str]:
    # With the condition images: one instruction may be given for many images.
    return str(item.get("prompt")), str(item.get("images"))


def exact_share(sample: SampleSet) -> float | None:
    """Share of the images whose OCR reading is right; None for a set without readings."""
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
    # Of the kept images alone: the counts of the whole evaluation are in the tiles.
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
    # Without one of its images the pair would show no change.
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
    """An image of a sample set with its label, reward and reading; "" where the file is lost or the
    budget of thumbnails is used up."""
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
    """The name of the file with an item's condition images, None without any."""
    return item["condition"] if isinstance(item.get("condition"), str) else None


def _condition(pair: Pair) -> str | None:
    return _condition_of(pair.tuned or pair.base or {})


def _has_conditions(sample: SampleSet) -> bool:
    return any(_condition_of(item) for item in sample.items)


def _before(pair: Pair, sample: SampleSet, thumbnails: Thumbnails) -> list[str]:
    """The figure of a pair's condition images; empty where there are none or the file is lost."""
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
    # A moving thumbnail has a still one for readers who have asked for less motion.
    return (
        '<picture><source media="(prefers-reduced-motion: reduce)"'
        f' srcset="{thumbnail.still}">{shown}</picture>'
    )


def _part(item: dict, key: str) -> dict:
    return item[key] if isinstance(item.get(key), dict) else {}


def _reading(item: dict) -> str | None:
    """What OCR read. None where it failed: its detail is then the error, not a reading."""
    reading = _part(item, "details").get("ocr")
    return (
        reading
        if isinstance(reading, str) and number(_part(item, "rewards").get("ocr")) is not None
        else None
    )


def _target(item: dict, prompt: str) -> str:
    # A prompt may ask for a word without quoting it; its metadata then names the word.
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
    """Each reward by name where there are several, and the details of rewards other than the OCR
    reading."""
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
        f"{name}: {str(value)[:120]}"  # a judge's whole answer would fill the page
        for name, value in details.items()
        if value not in (None, "") and not (read and name == "ocr")
    ]
    return f'<span class="parts">{escape(" · ".join(parts))}</span>' if parts else ""


def _strip(run: Run, thumbnails: Thumbnails) -> str:
    """The first prompts over the course of training; "" for fewer than three sample sets."""
    if len(run.samples) < 3:
        return ""
    columns = min(STRIP_COLUMNS, len(run.samples))
    # Evenly spaced, always with the first and the last set.
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
        first = sets[0].items[place]
        thumbnail = (
            thumbnails.get(sets[0].folder / first["condition"]) if _condition_of(first) else None
        )
        cells.append(f"<td>{_img(thumbnail, 'condition image')}</td>" if thumbnail else "<td></td>")
    for sample in sets:
        item = sample.items[place] if place < len(sample.items) else {}
        # Still: dozens of videos that move at once would be hard to compare.
        thumbnail = (
            thumbnails.get(sample.folder / str(item["file"]), moving=False) if item else None
        )
        alt = f"iteration {sample.iteration}: {item.get('prompt', '')}"
        cells.append(
            f"<td>{_img(thumbnail, alt)}{_reward(item)}</td>" if thumbnail else "<td></td>"
        )
    return "".join(cells)


def signed(value: float, digits: int = 3) -> str:
    """Text such as +0.310, −0.020 or 0.000, with a minus as wide as the plus."""
    if abs(value) < 0.5 * 10**-digits:
        return f"{0:.{digits}f}"
    return f"{value:+.{digits}f}".replace("-", "−")
