"""GPUs of this machine, locked by the runs that use them."""

import contextlib
import os
import threading
import time

import pytest
import torch

from hloss.study import devices
from hloss.study.devices import own_devices, usable_gpus, visible_devices


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "visible_devices", lambda: ["0", "1"])
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))


def test_visible_devices_follow_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert visible_devices() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_devices() == [str(n) for n in range(torch.cuda.device_count())]


def test_count_of_gpus_leaves_cuda_of_this_process_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(1) or True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    assert usable_gpus() == 3
    assert not asked
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)  # as in a child of a process that uses CUDA
    assert usable_gpus() == 3
    assert asked


def test_each_run_sees_its_own_gpus(monkeypatch, two_gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with own_devices(1) as first, own_devices(1) as second:
        assert (first, second) == (["0"], ["1"])
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    with own_devices(0) as none:
        assert none == []
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_run_on_two_gpus_locks_both_or_none(two_gpus):
    got = threading.Event()

    def wait_for_two():
        with own_devices(2) as both:
            assert both == ["0", "1"]
            got.set()

    with own_devices(1):
        waiting = threading.Thread(target=wait_for_two)
        waiting.start()
        assert not got.wait(0.2)
        held = own_devices(1)
        with held as other:  # the waiting thread releases GPU 1 between its attempts
            assert other == ["1"]
    waiting.join(10)
    assert got.is_set()


def test_small_runs_share_gpus_evenly(two_gpus):
    shares = (2, 4, 2, 16)
    with contextlib.ExitStack() as held:
        assert [held.enter_context(own_devices(1, share)) for share in shares] == [["0"], ["1"], ["0"], ["1"]]


def test_at_most_the_given_number_of_runs_share_a_gpu(two_gpus):
    got = threading.Event()

    def wait_for_a_share():
        with own_devices(1, 2):
            got.set()

    with own_devices(1, 2), own_devices(1, 2), own_devices(1, 2), own_devices(1, 2) as last:
        assert last == ["1"]
        waiting = threading.Thread(target=wait_for_a_share)
        waiting.start()
        assert not got.wait(0.2)
    waiting.join(10)
    assert got.is_set()


def test_run_with_its_own_gpu_waits_for_all_that_share_it(two_gpus):
    got = threading.Event()

    def wait_for_both():
        with own_devices(2):
            got.set()

    with own_devices(1, 16):
        waiting = threading.Thread(target=wait_for_both)
        waiting.start()
        assert not got.wait(0.2)
        with own_devices(1) as other:
            assert other == ["1"]
    waiting.join(10)
    assert got.is_set()
