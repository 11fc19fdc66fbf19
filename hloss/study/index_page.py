"""The index page of a study: its runs, their state and their validation curves, as one HTML file that reloads itself.

A browser opens the file without a server, on this machine or on the login node of a cluster.
"""

import html
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hloss.runs.checkpoints import read_progress, read_status
from hloss.runs.files import atomic_write, read_result
from hloss.study.spec import Study, StudyRun

RELOAD_SECONDS = 10
COLORS = ("#4477aa", "#cc6677", "#228833", "#b8860b", "#66ccee", "#aa3377", "#777777", "#ee7733")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 280, 56, 18, 34  # of the chart, in pixels
PACE_RUNS = 5  # least number of complete runs to estimate the time left by their pace
STATES = {"complete": "complete", "failed": "failed", "stopped": "stopped", "running": "at work", "to do": "to do"}
STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --page: #fff; --line: #bbb; --soft: #595959; --bad: #b00020;
  --complete: #1f6f43; --failed: #b00020; --stopped: #b26a00; --running: #3b6ea8; --to-do: #d5d5d5; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #eee; --page: #181818; --line: #555; --soft: #aaa; --bad: #ff7b88;
    --complete: #4caf7d; --failed: #ff7b88; --stopped: #e0a040; --running: #7fb0e8; --to-do: #444; }
}
body { font: 16px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 62rem;
  margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 0.4rem; }
.count { font-size: 1.9rem; font-weight: 650; line-height: 1.2; margin: 0.8rem 0 0; }
.bar { display: flex; height: 0.9rem; margin: 0.6rem 0; max-width: 45rem; border-radius: 0.3rem; overflow: hidden; }
.bar span { flex: 1 0 0; }
.key { display: flex; flex-wrap: wrap; gap: 0.1rem 1.2rem; margin: 0; padding: 0; list-style: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: normal; }
tr > :first-child { min-width: 9rem; }
th { vertical-align: bottom; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.runs { margin: 0; padding: 0; list-style: none; }
.runs li { border-left: 0.25rem solid var(--bad); padding: 0.1rem 0 0.1rem 0.7rem; margin: 0 0 0.8rem; }
.runs strong { display: block; }
.failed { color: var(--bad); font-weight: 600; }
.soft, svg text { color: var(--soft); fill: var(--soft); font-size: 0.85rem; }
svg { width: 100%; height: auto; max-width: 45rem; }
details { margin-top: 1.6rem; }
a { color: inherit; }
@media (max-width: 40rem) { .count { font-size: 1.5rem; } svg text { font-size: 1.4rem; } }
"""


class RunState(NamedTuple):
    """State of a run, as the page shows it.

    Attributes:
        run: the run.
        state: "complete", "running", "failed", "stopped" or "to do".
        message: reason why it failed or stopped; otherwise empty.
        progress: content of its progress.json, empty before its first validation.
        result: content of its result.json; None before its end.
    """

    run: StudyRun
    state: str
    message: str
    progress: dict[str, Any]
    result: dict[str, Any] | None


class IndexPage:
    """Writer of `runs/STUDY/index.html`, which reads each complete run once.

    Args:
        study: the study with its known runs.

    Attributes:
        outdated: whether the next `write_if_due` writes the page regardless of its age.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.file = Path("runs") / study.name / "index.html"
        self.complete: dict[Path, RunState] = {}
        self.outdated, self.written_at = True, 0.0
        self.started = time.monotonic()
        self.complete_at_start: int | None = None

    def write_if_due(self) -> None:
        """Write the page if it is outdated or older than RELOAD_SECONDS. Errors of the file system are ignored."""
        if self.outdated or time.monotonic() - self.written_at >= RELOAD_SECONDS:
            with suppress(OSError):
                self.write()

    def write(self) -> None:
        """Write the page.

        Raises:
            OSError: a run's folder cannot be read, or the page cannot be written.
        """
        self.outdated, self.written_at = False, time.monotonic()
        states = [self._state(run) for run in self.study.runs]
        text = page(self.study, states, self.file.parent, self._seconds_left(states))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # `make study` and `make watch` can write the page at the same time: each process has its own temporary file.
        own = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        atomic_write(own, lambda part: part.write_text(text, encoding="utf-8"))
        own.replace(self.file)

    def _state(self, run: StudyRun) -> RunState:
        folder = run.config.folder
        if folder not in self.complete:
            found = read_state(run)
            if found.state != "complete":
                return found
            self.complete[folder] = found
        return self.complete[folder]

    def _seconds_left(self, states: Sequence[RunState]) -> float | None:
        """Estimate the time left by the runs completed since the first page, or by `seconds_left` if they are few."""
        count = Counter(s.state for s in states)
        if self.complete_at_start is None:
            self.complete_at_start = count["complete"]
        new, left = count["complete"] - self.complete_at_start, count["running"] + count["to do"]
        if left and new >= max(PACE_RUNS, 2 * count["running"]):
            return (time.monotonic() - self.started) / new * left
        return seconds_left(states)


def read_state(run: StudyRun) -> RunState:
    """Read the state of a run from its folder.

    Args:
        run: a run of a study.
    """
    folder = run.config.folder
    progress, result = read_progress(folder) or {}, read_result(folder)
    if result:
        return RunState(run, "complete", "", progress, result)
    at_first = "running" if (folder / "run.log").exists() else "to do"  # the log begins before the status
    status = read_status(folder) or {"state": at_first, "message": ""}
    state = "running" if status["state"] == "complete" else status["state"]  # its result is not yet written
    return RunState(run, state, status["message"], progress, None)


def page(study: Study, states: Sequence[RunState], folder: Path, left: float | None) -> str:
    """HTML of the index page.

    Args:
        study: the study.
        states: states of its runs.
        folder: folder of the page, to which links are relative.
        left: seconds until the study is complete; None if unknown.
    """
    by_state = {name: [s for s in states if s.state == name] for name in STATES}
    working = bool(by_state["running"] or by_state["to do"] or study.waiting)
    sections = [
        _failed_list("Failed", by_state["failed"], folder),
        _failed_list("Stopped", by_state["stopped"], folder),
        _running_table(by_state["running"], folder),
        _chart(states),
        _complete_table(by_state["complete"], folder),
        _details(f"{len(by_state['to do'])} runs to do", (_name(s) for s in by_state["to do"])),
    ]
    reload = f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">' if working else ""
    failed = f", {len(by_state['failed'])} failed" if by_state["failed"] else ""
    title = f"{len(by_state['complete'])} of {len(states)}{failed}: {study.name}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{reload}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{html.escape(study.title)}</h1>{_summary(study, by_state, left)}{''.join(sections)}"
        f'<p class="soft">Written {time.strftime("%Y-%m-%d %H:%M:%S")}. '
        f"{f'The page reloads every {RELOAD_SECONDS} seconds.' if working else 'No run is at work.'}</p>"
        "</main></body></html>\n"
    )


def _summary(study: Study, by_state: Mapping[str, Sequence[RunState]], left: float | None) -> str:
    """Numbers of runs in words and as a bar, and the time left."""
    count = {name: len(runs) for name, runs in by_state.items()}
    said = [(name, f"{number} {STATES[name]}") for name, number in count.items() if number]
    parts = "".join(f'<span style="flex-grow:{count[name]};background:{_color(name)}"></span>' for name, _ in said)
    items = [
        f'<span style="color:{_color(name)}" aria-hidden="true">&#9632;</span> <span class="{name}">{text}</span>'
        for name, text in said
    ]
    items += [f"{len(study.waiting)} more wait for settings that a grid chooses"] if study.waiting else []
    items += [] if left is None else [f"<strong>about {_duration(left)} left</strong>"]
    key = "".join(f"<li>{item}</li>" for item in items)
    return (
        f'<p class="count">{count["complete"]} of {sum(count.values())} runs complete</p>'
        f'<div class="bar" role="img" aria-label="{", ".join(text for _, text in said)}">{parts}</div>'
        f'<ul class="key">{key}</ul>'
    )


def _color(state: str) -> str:
    return f"var(--{state.replace(' ', '-')})"


def seconds_left(states: Sequence[RunState]) -> float | None:
    """Estimate the training time left.

    A run at work takes its own time left, a run to do the mean time of complete runs. The sum is divided by the number
    of runs at work.

    Args:
        states: states of all runs of a study.

    Returns:
        Seconds; None without a complete run, or if no run is at work.
    """
    running = [s for s in states if s.state == "running"]
    done = [s.result["training_seconds"] for s in states if s.result]
    if not running or not done:
        return None
    mean = sum(done) / len(done)
    of_running = sum(s.progress.get("seconds_left", mean) for s in running)
    return float((of_running + mean * sum(s.state == "to do" for s in states)) / len(running))


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _name(state: RunState) -> str:
    return html.escape(f"{state.run.dataset}: {state.run.name}")


def _link(state: RunState, file: str, text: str, folder: Path) -> str:
    target = os.path.relpath(state.run.config.folder / file, folder)
    return f'<a href="{html.escape(target)}" aria-label="{_name(state)}, {file}">{text}</a>'


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; titles of numeric columns end with " #". The text is empty without rows."""
    if not rows:
        return ""
    numeric = [' class="number"' * name.endswith(" #") for name in columns]
    head = "".join(f"<th{c}>{name.removesuffix(' #')}</th>" for c, name in zip(numeric, columns, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{c}>{cell}</td>' for c, cell in zip(numeric, row, strict=True))}</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{title}</h2><div class="scroll" tabindex="0" role="region" aria-label="{title}">{table}</div>'


def _failed_list(title: str, states: Sequence[RunState], folder: Path) -> str:
    """Name, message and log of each run."""
    items = "".join(
        f"<li><strong>{_name(s)}</strong>{html.escape(s.message)} ({_link(s, 'run.log', 'run.log', folder)})</li>"
        for s in states
    )
    return f'<h2>{title}</h2><ul class="runs">{items}</ul>' if items else ""


def _running_table(states: Sequence[RunState], folder: Path) -> str:
    rows = []
    for s in states:
        p = s.progress
        recall = f"{100 * p['validations'][-1][1]:.1f}" if p.get("validations") else ""
        numbers = ["starting", "", "", "", ""]
        if p:
            done = f"{p['iteration']:,} of {p['iterations']:,}"
            rate, left = f"{p['images_per_second']:,.0f}", _duration(p["seconds_left"])
            numbers = [left, done, recall, f"{p['loss']:.4f}", rate]
        rows.append([_link(s, "run.log", _name(s), folder), *numbers])
    columns = ["run", "left #", "iteration #", "validation Recall@1 (%) #", "loss #", "images/s #"]
    return _table("At work", columns, rows)


def _complete_table(states: Sequence[RunState], folder: Path) -> str:
    rows = []
    for s in states:
        assert s.result is not None
        recall = f"{100 * s.result['metrics']['recall@1']:.1f}"
        rows.append([_link(s, "run.ipynb", _name(s), folder), recall, _duration(s.result["training_seconds"])])
    return _table("Complete", ["run", "test Recall@1 (%) #", "training #"], rows)


def _details(title: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<details><summary>{title}</summary><ul>{items}</ul></details>" if items else ""


def _chart(states: Sequence[RunState]) -> str:
    """Validation Recall@1 over the iterations: one line per run, one color per loss."""
    curves = [(s.run.config.loss, s.progress["validations"]) for s in states if s.progress.get("validations")]
    if not curves:
        return ""
    losses = list(dict.fromkeys(loss for loss, _ in curves))
    color = {loss: COLORS[i % len(COLORS)] for i, loss in enumerate(losses)}
    last = max(iteration for _, points in curves for iteration, _ in points)

    def place(iteration: float, recall: float) -> str:
        x = LEFT + (WIDTH - LEFT - 10) * iteration / last
        return f"{x:.1f},{(HEIGHT - BOTTOM) - (HEIGHT - BOTTOM - TOP) * recall:.1f}"

    lines = "".join(
        f'<polyline points="{" ".join(place(*point) for point in points)}" fill="none" stroke="{color[loss]}" '
        'stroke-width="1.5" stroke-opacity="0.7"/>'
        for loss, points in curves
    )
    grid = "".join(
        f'<path d="M{place(0, r).replace(",", " ")} H{WIDTH - 10}" stroke="var(--line)" stroke-width="0.5"/>'
        f'<text x="{LEFT - 6}" y="{float(place(0, r).split(",")[1]) + 4}" text-anchor="end">{100 * r:.0f}</text>'
        for r in (0, 0.25, 0.5, 0.75, 1)
    )
    ends = f'<text x="{LEFT}" y="{HEIGHT - 8}">0</text><text x="{WIDTH - 10}" y="{HEIGHT - 8}" text-anchor="end">'
    legend = " ".join(f'<span style="color:{color[loss]}">&#9632;</span> {html.escape(loss)}' for loss in losses)
    return (
        f'<h2>Validation</h2><figure style="margin:0"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Validation Recall@1 in percent of {len(curves)} runs over {last} iterations">'
        f"{grid}{ends}{last:,} iterations</text>{lines}</svg>"
        f"<figcaption>Validation Recall@1 (%) over the iterations, a line per run. {legend}</figcaption></figure>"
    )
