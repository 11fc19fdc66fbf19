"""Commands that are watched and interrupted."""

import os
import signal
import sys

import pytest

from hloss.study import processes


def test_calls_meanwhile_until_the_command_ends():
    looks = []
    assert processes.call([sys.executable, "-c", "raise SystemExit(7)"], lambda: looks.append(1)) == 7
    assert looks


def test_forwards_a_signal_as_sigint(capfd):
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
        processes.call([sys.executable, "-c", code], stop)
    assert "asked" in printed + capfd.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
