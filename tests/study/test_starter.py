"""A process that carries out scripts of its clients with everything imported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hloss.study import starter as starters
from tests.helpers.copied_project import wait_until
from tests.helpers.linux import LINUX_ONLY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the process is started only on Linux")
SCRIPTS = Path(__file__).parents[2] / "workflow" / "scripts"
CLIENT = f"""
import os, sys
sys.path.insert(0, {str(SCRIPTS)!r})
from run_notebook import ask_starter
sys.argv = sys.argv[1:]
status = ask_starter(os.environ.pop("HLOSS_STARTER"))
sys.exit("not served" if status is None else status)
"""


@pytest.fixture(scope="module")
def started():
    with starters.starter():
        yield


def command(folder, code, *arguments):
    """Command and options of a client whose script is this code."""
    (folder / "script.py").write_text(code)
    environment = os.environ | {"OF_CLIENT": "its own"}
    return [sys.executable, "-c", CLIENT, "script.py", *arguments], {"cwd": folder, "env": environment}


def carried_out(folder, code, *arguments):
    words, options = command(folder, code, *arguments)
    return subprocess.run(words, **options, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("end", "status", "error"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('a reason')", 1, "a reason\n"),
        ("os.kill(os.getpid(), 9)", 128 + 9, ""),
    ],
)
@pytest.mark.usefixtures("started")
def test_carries_out_a_script_as_its_client_would(end, status, error, tmp_path):
    (tmp_path / "beside.py").write_text("here = 'imported'")
    code = "import beside, os, sys\nprint(sys.argv, beside.here, os.environ['OF_CLIENT'], os.getcwd(), __name__)\n"
    code += "print('HLOSS_STARTER' in os.environ, 'torch' in sys.modules, flush=True)\n"
    answer = carried_out(tmp_path, code + end, "one", "two words")
    assert answer.stdout == f"['script.py', 'one', 'two words'] imported its own {tmp_path} __main__\nFalse True\n"
    assert (answer.returncode, answer.stderr) == (status, error)


@pytest.mark.usefixtures("started")
def test_an_exception_of_a_script_is_printed_and_another_script_is_served(tmp_path):
    answer = carried_out(tmp_path, "1 / 0")
    assert "ZeroDivisionError" in answer.stderr
    assert answer.returncode == 1
    assert carried_out(tmp_path, "").returncode == 0


WAITING = """
import pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path("stopped").write_text(str(int(number)))
    sys.exit(7)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
pathlib.Path("begun").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.usefixtures("started")
def test_signals_and_the_end_of_a_client_reach_its_script(number, tmp_path):
    words, options = command(tmp_path, WAITING)
    with subprocess.Popen(words, **options) as process:
        wait_until("the script waits", (tmp_path / "begun").exists)
        process.send_signal(number)
        assert process.wait(60) == (-9 if number == signal.SIGKILL else 7)
    wait_until("the script stops", lambda: (tmp_path / "stopped").exists() and (tmp_path / "stopped").read_text(), 20)
    assert int((tmp_path / "stopped").read_text()) == (signal.SIGTERM if number == signal.SIGKILL else number)


def test_needs_no_function_of_newer_kernels(tmp_path, monkeypatch):
    removed = f"import os\nfor name in {LINUX_ONLY}:\n    hasattr(os, name) and delattr(os, name)\n"
    (tmp_path / "sitecustomize.py").write_text(removed)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("HLOSS_STARTER", "of another process, which is named again at the end")
    with starters.starter():
        answer = carried_out(tmp_path, "import os, sys\nsys.exit(3 + hasattr(os, 'pidfd_open'))")
    assert (answer.returncode, answer.stderr) == (3, "")


def test_refuses_clients_after_a_module_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("HLOSS_STARTER", "of another process, which is named again at the end")
    monkeypatch.setattr(time, "time", lambda: 0.0)  # all modules are newer
    with starters.starter():
        assert carried_out(tmp_path, "").stderr == "not served\n"


def test_without_the_process_a_client_carries_out_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HLOSS_STARTER", str(tmp_path / "none"))
    assert carried_out(tmp_path, "").stderr == "not served\n"


def test_nothing_is_left_at_the_end(monkeypatch):
    monkeypatch.delenv("HLOSS_STARTER", raising=False)
    with starters.starter():
        address = Path(os.environ["HLOSS_STARTER"])
        assert address.is_socket()
    assert not address.parent.exists()
    assert "HLOSS_STARTER" not in os.environ
