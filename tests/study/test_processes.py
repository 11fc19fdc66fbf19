"""Commands that are watched and interrupted."""

import os
import signal
import sys

import pytest

from hloss.study import processes


def test_calls_meanwhile_until_the_command_ends_and_keeps_its_errors(tmp_path):
    looks = []
    command = [sys.executable, "-c", "raise SystemExit('wrong')"]
    assert processes.call(command, lambda: looks.append(1), tmp_path / "errors") == 1
    assert looks
    assert (tmp_path / "errors").read_text() == "wrong\n"


def test_forwards_a_signal_as_sigint(capfd, tmp_path):
    code = "import time\nprint('begun', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('asked')"
    printed = ""

    def stop():
        nonlocal printed
        new = capfd.readouterr().out
        printed += new
        if "begun" in new:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="the same command continues"):
        processes.call([sys.executable, "-c", code], stop, tmp_path / "errors")
    assert "asked" in printed + capfd.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
