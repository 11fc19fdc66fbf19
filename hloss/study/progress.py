"""Progress of a study, read from the folders of its runs on this machine or a cluster."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hloss.runs.checkpoints import read_progress, read_status
from hloss.runs.files import read_result
from hloss.study.index_page import IndexPage
from hloss.study.spec import Study, StudyRun


class Progress:
    """Print a line when a run starts, stops, fails or is complete, and keep the study's index page up to date.

    Call the object every second while the study runs.

    Args:
        study: the study with its known runs.
    """

    def __init__(self, study: Study) -> None:
        self.study, self.page = study, IndexPage(study)
        folders = [(run, run.config.folder) for run in study.runs]
        self.todo = [(run, folder) for run, folder in folders if not (folder / "result.json").exists()]
        self.total, self.first = len(study.runs), len(self.todo)
        self.started = time.monotonic()
        self.several = len({run.dataset for run in study.runs}) > 1
        self.seen = {folder: (_status_time(folder), "") for _, folder in self.todo}
        self.bars: dict[Path, tqdm[Any]] | None = {} if sys.stderr.isatty() else None

    def print_start(self) -> None:
        """Print how many runs are complete."""
        print(f"study {self.study.name}: {self.total - self.first} of {self.total} runs are complete", flush=True)
        print(f"{self.page.file} shows the runs", flush=True)

    def __call__(self) -> None:
        """Print the changes since the last call."""
        with suppress(OSError):  # if a network file system does not answer, the next call prints the changes
            self._print_changes()
            self._move_bars()
        self.page.write_if_due()

    def _print_changes(self) -> None:
        for run, folder in list(self.todo):
            result = read_result(folder)
            if result is None:
                self._print_state(run, folder)
            else:
                self.todo.remove((run, folder))
                recall = 100 * result["metrics"]["recall@1"]
                self._print(
                    f"{self._count()}  {self._name(run)}: test Recall@1 {recall:.1f} % ({self._minutes_left()})"
                )

    def _print_state(self, run: StudyRun, folder: Path) -> None:
        """Print a new state once; ignore statuses from before this start."""
        before, state = self.seen[folder]
        if _status_time(folder) == before:
            return
        status = read_status(folder)
        if status is None:
            return
        self.seen[folder] = (_status_time(folder), status["state"])
        if status["state"] not in (state, "complete"):
            word = "started" if status["state"] == "running" else status["state"]
            self._print(f"{word:>8}  {self._name(run)}{': ' * bool(status['message'])}{status['message']}")

    def _move_bars(self) -> None:
        """Update one line per run at work; only in a terminal."""
        if self.bars is None:
            return
        at_work = {folder: run for run, folder in self.todo if self.seen[folder][1] == "running"}
        for folder in set(self.bars) - set(at_work):
            self.bars.pop(folder).close()
        for folder, run in at_work.items():
            if numbers := read_progress(folder):
                if folder not in self.bars:
                    self.bars[folder] = self._bar(run, numbers["iterations"])
                bar = self.bars[folder]
                recall = f", validation {100 * numbers['validations'][-1][1]:.1f} %" if numbers["validations"] else ""
                shown = f"loss {numbers['loss']:.4f}{recall}, {numbers['images_per_second']:.0f} images/s"
                bar.n = numbers["iteration"]
                bar.set_postfix_str(shown)

    def _bar(self, run: StudyRun, iterations: int) -> "tqdm[Any]":
        form = "{desc}: {percentage:.0f} % of {total} iterations{postfix}"
        return tqdm(total=iterations, desc=self._name(run), leave=False, bar_format=form)

    def _print(self, line: str) -> None:
        """Print a line above the lines of runs at work; the page shows the change at once."""
        self.page.outdated = True
        with tqdm.external_write_mode():
            print(line, flush=True)

    def _name(self, run: StudyRun) -> str:
        return f"{run.dataset}: {run.name}" if self.several else run.name

    def _count(self) -> str:
        return f"{f'[{self.total - len(self.todo)}/{self.total}]':>8}"

    def _minutes_left(self) -> str:
        minutes = (time.monotonic() - self.started) / 60
        return f"about {minutes * len(self.todo) / (self.first - len(self.todo)):.1f} min left"


def _status_time(folder: Path) -> int:
    file = folder / "status.json"
    return file.stat().st_mtime_ns if file.exists() else 0
