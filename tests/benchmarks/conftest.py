"""Races: the sides of a comparison are timed in turn, round by round, so that what slows the machine slows them all.

`python -m pytest tests/benchmarks` prints one table. A ratio below 1 is faster than the floor named in its row.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

ROWS = pytest.StashKey[list]()
HEADER = ("case", "side", "median", "10-90 % of rounds", "ratio to", "floor", "rounds")


@dataclass(frozen=True)
class Race:
    """Median seconds of every side, by name."""

    medians: dict[str, float]

    def ratio(self, side: str, floor: str) -> float:
        return self.medians[side] / self.medians[floor]


@pytest.fixture
def race(benchmark, request) -> Callable[..., Race]:
    """`race(case, floor, {floor: f, side: g, ...})` times the sides in turn; the last is pytest-benchmark's own."""

    def run(case: str, floor: str, sides: dict[str, Callable[[], object]], rounds: int = 20) -> Race:
        *others, last = sides
        seconds: dict[str, list[float]] = {name: [] for name in others}

        def time_the_others() -> None:
            for name in others:
                start = time.perf_counter()
                sides[name]()
                synchronize()
                seconds[name].append(time.perf_counter() - start)

        for side in sides.values():
            side()

        def timed() -> None:
            sides[last]()
            synchronize()

        benchmark.pedantic(timed, setup=time_the_others, rounds=rounds)
        seconds[last] = benchmark.stats.stats.data
        for name, times in seconds.items():
            against = [] if name == floor else [f"{statistics.median(times) / statistics.median(seconds[floor]):.2f}"]
            row = (case, name, span([statistics.median(times)]), span(times), *(against or ["1"]), floor, str(rounds))
            request.config.stash.setdefault(ROWS, []).append(row)
        found = Race({name: statistics.median(times) for name, times in seconds.items()})
        benchmark.extra_info.update({f"{name} / {floor}": found.ratio(name, floor) for name in seconds})
        return found

    return run


@pytest.fixture
def record(request) -> Callable[..., None]:
    """`record(case, side, value, note)`: a row that is not a race, such as a peak of memory."""

    def add(case: str, side: str, value: str, note: str = "") -> None:
        request.config.stash.setdefault(ROWS, []).append((case, side, value, note, "", "", ""))

    return add


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def span(times: list[float]) -> str:
    low, high = sorted(times)[len(times) // 10], sorted(times)[-1 - len(times) // 10]
    show = f"{low * 1e3:.3g}" if len(times) == 1 else f"{low * 1e3:.3g} - {high * 1e3:.3g}"
    return f"{show} ms"


def peak_above_start(code: str) -> int:
    """Bytes by which a new process's resident memory peaks, in the lines of `code` after "# start", above that line.

    Linux tells; `resource.getrusage` would not do: a new process inherits the peak of the one that started it.
    """
    before, after = code.split("# start\n")
    script = "\n".join([
        "import re",
        "from pathlib import Path",
        "def kib(name): return int(re.search(name + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])",
        before,
        "Path('/proc/self/clear_refs').write_text('5')",
        "start = kib('VmRSS')", after,
        "print(1024 * (kib('VmHWM') - start))",
    ])  # fmt: skip
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(answer.stdout.split()[-1])


def pytest_terminal_summary(terminalreporter, config) -> None:
    rows = config.stash.get(ROWS, [])
    if rows:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "not measured"
        terminalreporter.write_line(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads; GPU: {gpu}\n")
        for row in (HEADER, ("---",) * len(HEADER), *rows):
            terminalreporter.write_line(f"| {' | '.join(row)} |")
