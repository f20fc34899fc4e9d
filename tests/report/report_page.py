"""A report as a reader gets it: its elements, texts and data."""

import json
import re
from html.parser import HTMLParser

from tempflow.run.report import write_report

VOID = {"meta", "img", "input", "br", "link", "source"}


class Page(HTMLParser):
    """Every element with its attributes and the nesting checked; texts of script and style kept
    apart."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.visible, self.scripts = [], [], [], []
        self.feed(text)
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        (self.scripts if inside in ("script", "style") else self.visible).append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.visible))

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def data(self):
        return json.loads(next(text for text in self.scripts if text.startswith('{"frames"')))

    def chart(self, title):
        return next((chart for chart in self.data["charts"] if chart["title"] == title), None)


def page(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))
