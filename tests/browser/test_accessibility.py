"""Report, index page and site have no serious violation of accessibility, by axe-core in a browser."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.index_pages import index_page

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SERIOUS = ("serious", "critical")
SITE = (
    "docs/index.html",
    "docs/claims.html",
    "docs/losses.html",
    "docs/api/library.html",
    "notebooks/00_histogram_loss.html",
)
STUDIES = {
    "complete": {"complete": 40},
    "running": {"complete": 17, "running": 3, "to_do": 20},
    "failed": {"complete": 36, "running": 2, "failed": 2},
}


@pytest.fixture(scope="module")
def axe():
    return pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install -e '.[browser]'").Axe()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, as `make docs` builds it."""
    pytest.importorskip("myst_nb", reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "-c", "docs", ".", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return folder


def violations(axe, visit, file):
    """Serious violations in both schemes on a wide and a narrow screen: rule, help text, element and what is wrong.

    The contrast of colours, which takes most of the time, is checked on the wide screen.
    """
    found = []
    for scheme in ("light", "dark"):
        for width in (1300, 390):
            visit.page.emulate_media(color_scheme=scheme)
            visit.page.set_viewport_size({"width": width, "height": 900})
            rules = {"color-contrast": {"enabled": width == 1300}}
            page = visit.open(file)
            answer = axe.run(page, options={"resultTypes": ["violations"], "rules": rules}).response
            found += [
                f"{scheme}, {width} px: {one['id']} ({one['impact']}): {one['help']}\n"
                f"  {node['target']} {node['html'][:200]}\n  {node['failureSummary']}"
                for one in answer["violations"]
                if one["impact"] in SERIOUS
                for node in one["nodes"]
            ]
    return found


def check(axe, visit, file):
    found = violations(axe, visit, file)
    assert not found, f"{file.name} has {len(found)} serious violations:\n" + "\n".join(found)


def test_violations_are_found(axe, visit, tmp_path):
    (tmp_path / "page.html").write_text(
        '<!doctype html><html lang="en"><title>t</title><main><h1>h</h1><p style="color:#ccc;background:#fff">pale</p>'
        f'<pre style="overflow-x:auto">{"wide " * 300}</pre></main></html>'
    )
    found = [line.split(" (")[0] for line in violations(axe, visit, tmp_path / "page.html")]
    assert sorted(found) == sorted(
        [f"{scheme}, 1300 px: color-contrast" for scheme in ("light", "dark")]
        + [
            f"{scheme}, {width} px: scrollable-region-focusable"
            for scheme in ("light", "dark")
            for width in (1300, 390)
        ]
    )


@pytest.mark.parametrize("numbers", STUDIES.values(), ids=STUDIES)
def test_index_page(axe, visit, tmp_path, numbers):
    file = tmp_path / "index.html"
    file.write_text(index_page(tmp_path, **numbers).replace('http-equiv="refresh"', 'name="no-reload"'))
    check(axe, visit, file)


def test_report_of_the_sample(axe, visit):
    check(axe, visit, ROOT / "reports/sample/report.html")


@pytest.mark.parametrize("page", SITE)
def test_site(axe, visit, site, page):
    check(axe, visit, site / page)
