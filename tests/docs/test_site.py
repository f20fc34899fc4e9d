"""The documentation site builds without a warning, and nothing in it is fetched from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_needs_no_network(site):
    """No script, style, font or image of another host."""
    loading = re.compile(
        r"""<(?:script|link|img|source|iframe)\b[^>]*?(?:src|href)=["']?(https?:)?//"""
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    assert not [page for page in pages if loading.search(page.read_text(encoding="utf-8"))]
    styles = [style.read_text(encoding="utf-8") for style in site.rglob("*.css")]
    assert styles and not any(re.search(r"url\([\"']?(https?:)?//", text) for text in styles)


def test_what_is_made_while_it_is_built(site):
    """Formulas, pages that lie outside docs/, files that pages link to, and the reference."""

    def page(name: str) -> str:
        return (site / name / "index.html").read_text(encoding="utf-8")

    assert page("method").count('class="formula"') == 4 and "(4)</span>" in page("method")
    assert not re.search(r"(?m)^<p><math|^<math", page("method")), "a formula within a line"
    assert "$`" not in page("method") and "\\frac" not in page("method")
    assert "make train" in page("") and "Contributing" in page("contributing")
    assert "group_loss" in page("kernels")
    link = re.search(r'href="([^"]*examples/plan[^"]*)"', page("extending"))[1]
    assert (site / "extending" / link / "index.html").resolve().exists()
    for name in ("train", "evaluate", "sample"):
        assert f'id="tempflow.api.{name}"' in page("api/engine")
    assert 'id="tempflow.sampling.plans.base.Plan.rows"' in page("api/parts")
    assert 'id="tempflow_kernels.ops.group_loss"' in page("api/kernels")
