"""A real browser, cut off from the network, and a copy of the project whose pages it opens."""

import os
import shutil
import subprocess
import sys
import urllib.parse
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.sample import sample_table

ROOT = Path(__file__).parents[2]
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # what no route sees reaches nobody, either
]
HERE = ("file", "data", "blob", "about")


@pytest.fixture(scope="session")
def browser():
    """Debian's chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install -e '.[browser]'")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page, the errors of its scripts, and the requests that would have left this machine."""

    def __init__(self, browser) -> None:
        self.errors: list[str] = []
        self.missing: list[str] = []  # files that did not load
        self.outside: list[str] = []
        self.context = browser.new_context(service_workers="block", viewport={"width": 1400, "height": 1000})
        self.context.set_default_timeout(30_000)
        self.context.route("**/*", self._route)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("websocket", lambda socket: self._outside(socket.url))

    def _outside(self, url: str) -> bool:
        parts = urllib.parse.urlsplit(url)
        leaves = parts.scheme not in HERE and parts.hostname != "127.0.0.1"
        if leaves:
            self.outside.append(url)
        return leaves

    def _route(self, route) -> None:
        if self._outside(route.request.url):
            route.abort()
        else:
            route.continue_()

    def _console(self, message) -> None:
        if message.type == "error":
            load = message.text.startswith("Failed to load resource")
            (self.missing if load else self.errors).append(f"{message.text} ({message.location['url']})")

    def open(self, file: Path):
        """The page of an HTML file once it has loaded, with every folded part of it open."""
        self.page.goto(file.resolve().as_uri(), wait_until="load")
        if self.page.locator("script#datatables").count():
            self.page.wait_for_function("document.documentElement.dataset.ready !== undefined")
        self.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        return self.page


@pytest.fixture
def new_visit(browser):
    with ExitStack() as stack:

        def new() -> Visit:
            visit = Visit(browser)
            stack.callback(visit.context.close)
            return visit

        yield new


@pytest.fixture
def visit(new_visit):
    return new_visit()


@pytest.fixture(scope="session")
def new_project(tmp_path_factory):
    """`new_project()` is a copy of the project to write in: pages link to some of it, notebooks read some."""

    def new() -> Path:
        folder = tmp_path_factory.mktemp("browser") / "hloss"
        passed = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        for name in ("hloss", "data_prep", "workflow", "notebooks", "docs", "reports/sample"):
            shutil.copytree(ROOT / name, folder / name, ignore=passed)
        for name in ("Makefile", "pyproject.toml", "README.md", "reports/claims.yaml", "reports/published_values.csv"):
            shutil.copy2(ROOT / name, folder / name)
        (folder / "data").symlink_to(ROOT / "data")
        return folder

    return new


@pytest.fixture(scope="session")
def project(new_project):
    """The copy whose report and notebooks become pages."""
    return new_project()


def called(folder: Path, *command: str) -> None:
    """Run a Python module or script of the project's copy; what it prints fails the test if it fails."""
    ours = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=ours, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="session")
def report(project):
    """The folder of the report on the committed sample of results, as `make study` leaves it, beside three runs."""
    runs = sample_table()
    study = runs["study"].iloc[0]
    folder = project / "reports" / study
    if folder.name != "sample":
        shutil.copytree(project / "reports/sample", folder)
    for made in ("*.html", "summary.csv", "claims.csv", "*.ipynb", "*.png", "*.svg"):
        for file in folder.glob(made):
            file.unlink()
    for run_id in runs["run_id"].unique()[:3]:
        (project / "runs" / study / run_id).mkdir(parents=True)
        (project / "runs" / study / run_id / "run.ipynb").touch()
    called(project, "workflow/scripts/run_notebook.py", "report", study)
    return folder


@pytest.fixture(scope="session")
def exported(project):
    """`exported(notebook)` is a notebook's page beside it, by nbconvert, with the outputs as they are committed."""

    def page_of(notebook: str) -> Path:
        called(project, "-m", "nbconvert", "--to", "html", f"notebooks/{notebook}.ipynb")
        return project / "notebooks" / f"{notebook}.html"

    return page_of
