"""Hooks of mkdocs (see mkdocs.yml), which adapt pages that are written for GitHub to the site.

Files outside docs/ to which pages link become pages of the site that show the file; the READMEs and
CONTRIBUTING.md become pages; formulas become MathML, which browsers draw without scripts and fonts
from elsewhere.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "kernels.md": "kernels/README.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Pages of the site whose sources are outside docs/."""
# The target and the anchor of a Markdown link within the repository.
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")
# A fenced block, which ends at the same indentation with the same number of backticks.
FENCE = re.compile(r"^( *)(`{3,})(\w*).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".json": "json", ".yml": "yaml", ".sh": "bash", ".md": "markdown"}
LONGEST = 60_000  # characters of a file that are shown


def on_files(files, config):
    """Add the pages and the linked files that are outside docs/."""
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for page, source in PAGES.items():
        texts[page] = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=texts[page]))
    for path in sorted({_target(page, link[1]) for page, t in texts.items() for link in _links(t)}):
        page, file = _page(path), ROOT / path
        if page.startswith("source/") and files.get_file_from_path(page) is None:
            is_image = file.suffix == ".png"
            shown = {"abs_src_path": str(file)} if is_image else {"content": _listing(path)}
            files.append(File.generated(config, page, **shown))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite links to what the site has at another place, and convert formulas."""
    uri = page.file.src_uri
    if uri.startswith("source/"):  # a file that is shown as it is
        return markdown
    # Code is left alone: it may contain what looks like a link or a formula.
    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [_prose(uri, markdown[at : fence.start()]), _fenced(fence)]
        at = fence.end()
    return "".join([*parts, _prose(uri, markdown[at:])])


def _links(text: str) -> list[re.Match]:
    return list(LINK.finditer(FENCE.sub("", text)))


def _target(page: str, link: str) -> str:
    """The path in the repository to which a link of a page leads."""
    folder = posixpath.dirname(PAGES.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(folder, link))


def _page(path: str) -> str:
    """The site's page for a path of the repository. FileNotFoundError for a broken link."""
    for page, source in PAGES.items():
        if path == source:
            return page
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"a page links to {path}, which does not exist")
    return f"source/{path}" if path.endswith(".png") else f"source/{path}.md"


def _listing(path: str) -> str:
    """The Markdown of a page that shows a file, or the names in a folder."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(f"* `{child.name}`" for child in file.iterdir() if child.name[0] not in "._")
        return f"# {path}\n\n" + "\n".join(names) + "\n"
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}\n(and {len(text) - LONGEST} characters more)\n"
    # Eight backticks, because the file may contain fences itself.
    return f"# {path}\n\n````````{LANGUAGES.get(file.suffix, 'text')}\n{text}\n````````\n"


def _cell(cell: dict) -> str:
    """The Markdown of a notebook's cell, with its stored outputs."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        if "text" in output:
            parts.append(f"```text\n{''.join(output['text'])}```")
        elif image := output["data"].get("image/png"):
            parts.append(f'<img alt="output" src="data:image/png;base64,{image}">')
    return "\n\n".join(parts)


def _prose(page: str, text: str) -> str:
    def moved(link: re.Match) -> str:
        place = _page(_target(page, link[1]))
        return posixpath.relpath(place, posixpath.dirname(page) or ".") + (link[2] or "")

    def inline(formula: re.Match) -> str:
        # In Markdown, a line that begins with <math> would begin a block of its own.
        return f"<span>{_mathml(formula[1], 'inline')}</span>"

    return LINK.sub(moved, re.sub(r"\$`(.+?)`\$", inline, text, flags=re.DOTALL))


def _fenced(fence: re.Match) -> str:
    if fence[3] != "math":
        return fence[0]
    formula = fence[0].strip().removeprefix("```math").removesuffix("```").strip()
    tag = re.search(r"\s*\\tag\{(\w+)\}", formula)
    number = f'<span class="number">({tag[1]})</span>' if tag else ""
    formula = formula.replace(tag[0], "") if tag else formula
    return f'<div class="formula">{_mathml(formula, "block")}{number}</div>'


def _mathml(formula: str, display: str) -> str:
    return latex2mathml.converter.convert(formula.replace("\n", " "), display=display)
