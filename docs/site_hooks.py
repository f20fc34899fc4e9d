"""What mkdocs does with the pages beyond their Markdown: see mkdocs.yml.

The pages are written for GitHub as well as for the site. So links to files outside docs/ become
pages of the site that show the file, the READMEs and CONTRIBUTING.md become pages, and formulas
become MathML while the site is built, which browsers draw without a script or a font of their own.
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
"""Pages of the site that lie outside docs/."""
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^( *)(`{3,})(\w*).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".json": "json", ".yml": "yaml", ".sh": "bash", ".md": "markdown"}
LONGEST = 60_000  # characters of a file that are shown


def on_files(files, config):
    """Add the pages and files that lie outside docs/."""
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
    """Links to what the site has in another place, and formulas."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [_prose(uri, markdown[at : fence.start()]), _fenced(fence)]
        at = fence.end()
    return "".join([*parts, _prose(uri, markdown[at:])])


def _links(text: str) -> list[re.Match]:
    return list(LINK.finditer(FENCE.sub("", text)))


def _target(page: str, link: str) -> str:
    """The place in the repository that a link of a page leads to."""
    folder = posixpath.dirname(PAGES.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(folder, link))


def _page(path: str) -> str:
    """The place in the site of a file or folder of the repository."""
    for page, source in PAGES.items():
        if path == source:
            return page
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"a page links to {path}, which is not there")
    return f"source/{path}" if path.endswith(".png") else f"source/{path}.md"


def _listing(path: str) -> str:
    """The page that shows a file, or the names in a folder."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(f"* `{child.name}`" for child in file.iterdir() if child.name[0] not in "._")
        return f"# {path}\n\n" + "\n".join(names) + "\n"
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}\n(and {len(text) - LONGEST} characters more)\n"
    return f"# {path}\n\n````````{LANGUAGES.get(file.suffix, 'text')}\n{text}\n````````\n"


def _cell(cell: dict) -> str:
    """A cell of a notebook, with its stored outputs."""
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
        # A line that begins with <math> would be a block of its own.
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
