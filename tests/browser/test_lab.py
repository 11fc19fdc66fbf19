"""JupyterLab as `make lab` opens it: it lists the notebooks, the first runs, and widgets turn their figures."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest

from tests.browser.conftest import called

pytestmark = pytest.mark.slow

TOKEN = "of-the-test"
SETTINGS = {  # no news are asked for, and a cell is in the page also where it is not in sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
RAN = """() => {
  const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(prompt => prompt.textContent);
  return prompts.length > 0 && prompts.every(text => /\\[\\d+\\]/.test(text));
}"""
# A study of two runs, which leave their embeddings.
SMALL_STUDY = """
import yaml
from pathlib import Path
from hloss.runs.run import run
from hloss.study.results import write_results
from hloss.study.spec import load_study
fixed = {"dataset": "glyphs", "iterations": 4, "validate_every": 4, "batch_size": 64}
losses = [{"name": "histogram", "set": {"loss": "histogram"}}, {"name": "contrastive", "set": {"loss": "contrastive"}}]
Path("small.yaml").write_text(yaml.safe_dump({"title": "two losses", "fixed": fixed, "seeds": [0], "runs": losses}))
study = load_study("small", Path("."))
for made in study.runs:
    run(made.config, report=print)
write_results(study, keep=False)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


@pytest.fixture
def lab_project(browser, new_project):
    """A copy of the project whose notebooks have no outputs, so that a number tells that a cell has run."""
    project = new_project()
    for file in (project / "notebooks").glob("*.ipynb"):
        forget_outputs(file)
    return project


@pytest.fixture
def lab(lab_project, tmp_path):
    """The address of a JupyterLab started by `make lab` in a copy of the project, with settings of its own."""
    port = free_port()
    server = {"open_browser": False, "ip": "127.0.0.1", "port": port, "port_retries": 0, "allow_root": True}
    config = {"ServerApp": server, "IdentityProvider": {"token": TOKEN}}
    write(tmp_path / "config/jupyter_server_config.json", config)
    for name, values in SETTINGS.items():
        write(tmp_path / f"settings/@jupyterlab/{name}.jupyterlab-settings", values)
    places = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    ours = {f"JUPYTER_{name}": str(tmp_path / place) for name, place in places.items()}
    ours |= {f"JUPYTERLAB_{name}_DIR": str(tmp_path / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    ours |= {"PYTHONPATH": str(lab_project), "OMP_NUM_THREADS": "1"}
    command = ["make", "lab", f"BIN={Path(sys.executable).parent}"]
    with open(tmp_path / "lab.log", "w") as log:
        start = subprocess.Popen(command, cwd=lab_project, env=os.environ | ours, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while not answers(f"http://127.0.0.1:{port}/api?token={TOKEN}"):
            assert start.poll() is None, (tmp_path / "lab.log").read_text()
            assert time.monotonic() < until, (tmp_path / "lab.log").read_text()
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/?token={TOKEN}"
    finally:
        end(start)


def write(file, values):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


def end(start):
    """End make, JupyterLab and its kernels, which outlive a server that is killed."""
    family = [*psutil.Process(start.pid).children(recursive=True), psutil.Process(start.pid)]
    for process in family:
        process.terminate()
    for process in psutil.wait_procs(family, timeout=15)[1]:
        process.kill()
    start.wait(15)


def test_the_start_page_says_which_notebook_answers_which_question(lab, visit):
    page = visit.page
    page.goto(lab)
    start = page.locator(".jp-MarkdownViewer")
    start.locator("td", has_text="Which claims of the paper do the runs of a study support?").wait_for(timeout=60_000)
    start.locator("a", has_text="30_compare_losses").click()
    page.locator(".lm-TabBar-tabLabel", has_text="30_compare_losses.ipynb").wait_for(timeout=60_000)
    assert visit.errors == visit.outside == []


def run_notebook(page, lab, name):
    """Open a notebook from the list of files and run all of its cells."""
    page.goto(lab)
    page.locator(".jp-DirListing-item", has_text=f"{name}.ipynb").dblclick()
    page.locator("#jp-main-statusbar", has_text="| Idle").wait_for(timeout=60_000)  # the notebook has its kernel
    page.locator(".lm-MenuBar-item", has_text="Run").first.click()
    page.locator(".lm-Menu-item", has_text="Run All Cells").first.click()
    page.wait_for_function(RAN, timeout=120_000)
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0


def test_the_first_notebook_runs_in_jupyterlab_and_a_slider_turns_its_figure(lab, visit):
    from playwright.sync_api import expect

    page = visit.page
    run_notebook(page, lab, "00_histogram_loss")
    turn = page.locator(".jp-CodeCell", has=page.locator(".widget-slider"))
    turn.scroll_into_view_if_needed()
    figure = turn.locator(".jp-OutputArea img").last
    before = figure.get_attribute("src")
    assert before.startswith("data:image/png")
    value = turn.locator(".widget-readout").first
    first = value.inner_text()
    turn.locator(".noUi-handle").first.focus()
    page.keyboard.press("PageUp")
    expect(figure).not_to_have_attribute("src", before, timeout=30_000)
    assert figure.get_attribute("src").startswith("data:image/png")
    assert value.inner_text() != first
    assert visit.errors == visit.outside == []


class Explorer:
    """The widgets of `35_explore` in a page: one section per code cell that shows one."""

    def __init__(self, page):
        shown = page.locator(".jp-CodeCell", has=page.locator(".widget-dropdown"))
        self.curves, self.neighbors, self.map = shown.nth(0), shown.nth(1), shown.nth(2)
        self.hovered = self.map.locator(".widget-html img").first

    def list_of(self, section, name):
        """The list with this description."""
        return section.get_by_label(name, exact=True)

    def legend(self):
        return self.curves.locator(".legendtext")

    def neighbor_pictures(self):
        pictures = self.neighbors.locator(".widget-html img")
        return pictures.evaluate_all("images => images.map(image => image.alt + image.src)")


def patient_expect():
    """Playwright's `expect` with a minute instead of 5 s: a kernel and a page share a busy machine."""
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    return expect


def test_the_explorer_draws_curves_and_says_what_the_sample_lacks(lab, visit):
    expect = patient_expect()
    page = visit.page
    run_notebook(page, lab, "35_explore")
    explorer = Explorer(page)
    expect(explorer.curves.locator(".js-plotly-plot")).to_be_visible()
    expect(explorer.curves.locator(".ytitle")).to_have_text("test Recall@1 (%)")
    expect(explorer.curves.locator(".xtitle")).to_have_text("n_bins")
    explorer.list_of(explorer.curves, "K").select_option("8")
    expect(explorer.curves.locator(".ytitle")).to_have_text("test Recall@8 (%)")
    explorer.list_of(explorer.curves, "comparison").select_option("losses")
    expect(explorer.curves.locator(".xtitle")).to_have_text("K (number of nearest images)")
    expect(explorer.legend().filter(has_text="contrastive")).to_have_count(1)
    expect(explorer.list_of(explorer.neighbors, "left").locator("option", has_text="contrastive")).to_have_count(1)
    before = explorer.neighbor_pictures()
    assert len(before) == 1 + 2 * 8
    query = explorer.list_of(explorer.neighbors, "query")
    assert query.locator("option").count() == 6
    query.select_option(index=3)
    expect(explorer.neighbors.locator(".widget-html img").first).not_to_have_attribute("src", picture_in(before[0]))
    after = explorer.neighbor_pictures()
    assert len(after) == len(before)
    assert after[1:] != before[1:]
    for section in (explorer.neighbors, explorer.map):
        expect(section.get_by_text("make study STUDY=quick")).to_be_visible()
    expect(explorer.map.locator(".js-plotly-plot")).to_be_hidden()
    assert visit.errors == visit.outside == []


def picture_in(text):
    return text[text.index("data:") :]


def test_the_explorer_shows_any_query_and_the_picture_under_the_mouse(lab, lab_project, visit):
    expect = patient_expect()
    called(lab_project, "-c", SMALL_STUDY)
    page = visit.page
    run_notebook(page, lab, "35_explore")
    explorer = Explorer(page)
    explorer.list_of(explorer.neighbors, "study").select_option("small")
    queries = explorer.list_of(explorer.neighbors, "queries")
    expect(queries.locator("option")).to_have_count(4)
    expect(explorer.neighbors.get_by_text("make study")).to_have_count(0)
    explorer.map.scroll_into_view_if_needed()
    expect(explorer.map.locator(".gtitle")).to_have_text(re.compile(r"histogram: 3,000 of 5,620 test images"))
    points = explorer.map.locator(".scatterlayer .trace").nth(1).locator(".points path")
    before = explorer.hovered.get_attribute("alt")
    place = points.nth(points.count() // 2).bounding_box()
    page.mouse.move(place["x"] - 40, place["y"] - 40)
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2, steps=8)
    expect(explorer.hovered).not_to_have_attribute("alt", before)
    assert explorer.hovered.get_attribute("src").startswith("data:image/png")
    query = explorer.list_of(explorer.neighbors, "query").locator("option:checked")
    first, pictures = query.inner_text(), explorer.neighbor_pictures()
    page.mouse.down()
    page.mouse.up()
    expect(query).not_to_have_text(first)
    picked = explorer.neighbors.locator(".widget-html img").first
    expect(picked).not_to_have_attribute("src", picture_in(pictures[0]))
    assert len(explorer.neighbor_pictures()) == 1 + 2 * 8
    assert visit.errors == visit.outside == []


def forget_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, file)
