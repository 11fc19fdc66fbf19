"""JupyterLab as `make lab` opens it: it lists the notebooks, the first runs, and a slider turns its figure."""

import json
import os
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

pytestmark = pytest.mark.slow

TOKEN = "of-the-test"
NOTEBOOK = "00_histogram_loss"
SETTINGS = {  # no news are asked for, and a cell is in the page also where it is not in sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
RAN = """() => {
  const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(prompt => prompt.textContent);
  return prompts.length > 0 && prompts.every(text => /\\[\\d+\\]/.test(text));
}"""


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
def lab(browser, new_project, tmp_path):
    """The address of a JupyterLab started by `make lab` in a copy of the project, with settings of its own."""
    project = new_project()
    forget_outputs(project / f"notebooks/{NOTEBOOK}.ipynb")  # so that a number tells that a cell has run
    port = free_port()
    server = {"open_browser": False, "ip": "127.0.0.1", "port": port, "port_retries": 0, "allow_root": True}
    config = {"ServerApp": server, "IdentityProvider": {"token": TOKEN}}
    write(tmp_path / "config/jupyter_server_config.json", config)
    for name, values in SETTINGS.items():
        write(tmp_path / f"settings/@jupyterlab/{name}.jupyterlab-settings", values)
    places = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    ours = {f"JUPYTER_{name}": str(tmp_path / place) for name, place in places.items()}
    ours |= {f"JUPYTERLAB_{name}_DIR": str(tmp_path / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    ours |= {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    command = ["make", "lab", f"BIN={Path(sys.executable).parent}"]
    with open(tmp_path / "lab.log", "w") as log:
        start = subprocess.Popen(command, cwd=project, env=os.environ | ours, stdout=log, stderr=log)
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


def test_the_first_notebook_runs_in_jupyterlab_and_a_slider_turns_its_figure(lab, visit):
    from playwright.sync_api import expect

    page = visit.page
    page.goto(lab)
    page.locator(".jp-DirListing-item", has_text=f"{NOTEBOOK}.ipynb").dblclick()
    page.locator("#jp-main-statusbar", has_text="| Idle").wait_for(timeout=60_000)  # the notebook has its kernel
    page.locator(".lm-MenuBar-item", has_text="Run").first.click()
    page.locator(".lm-Menu-item", has_text="Run All Cells").first.click()
    page.wait_for_function(RAN, timeout=120_000)
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
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


def forget_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, file)
