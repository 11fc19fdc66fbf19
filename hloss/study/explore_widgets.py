"""Widgets of the notebook `35_explore`: choices, curves, neighbours of a query, and a map of the embeddings.

They need a running kernel. Their data come from `hloss.study.explore`.

Figures are built with their first traces: a figure loses changes that are made before its script is loaded.
"""

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.colors
import plotly.graph_objects as go
from ipywidgets import HTML, Dropdown, HBox, Layout, VBox
from PIL import Image
from traitlets import Unicode

from hloss.runs.datasets import Dataset, open_dataset
from hloss.runs.errors import DatasetError
from hloss.runs.files import project_path
from hloss.study import explore
from hloss.study.explore import Gallery
from hloss.study.parts import parts_of
from hloss.study.plots import HIT, MISS, NEGATIVE, POSITIVE
from hloss.study.results import at_length, read_results, select_results

COLORS = plotly.colors.qualitative.Dark2
DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
ALL, LEFT, RIGHT, NEITHER = "all", "only left finds", "only right finds", "neither finds"
NAMES = ("nearest image is a hit", "nearest image is a miss", "class of the query", "its nearest images", "query")
MOST_QUERIES = 300  # in the list; a click on the map picks any of its images
FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#1f2328"}


# anywidget drops all changes of a widget whose script is not ready after 2 s. The script of plotly has 5 MB and takes
# longer on a busy machine. So the script of a figure is a small one, which loads that of plotly once for all figures.
SCRIPT = """
function load(text) {
  const file = () => URL.createObjectURL(new Blob([text], {type: "text/javascript"}));
  globalThis.hlossPlotly ??= import(file());
  return globalThis.hlossPlotly;
}
export default () => {
  let widget;
  return {
    initialize({model}) {
      widget = load(model.get("_plotly_script")).then(plotly => {
        const loaded = plotly.default();
        loaded.initialize({model});
        return loaded;
      });
    },
    async render(view) {
      return (await widget).render(view);
    },
  };
};
"""


class Figure(go.FigureWidget):
    """A plotly figure that is a widget, also on a slow machine."""

    _esm = SCRIPT
    _plotly_script = Unicode(str(go.FigureWidget._esm)).tag(sync=True)


def picture(image: np.ndarray) -> str:
    """An image as a data URL of a PNG file.

    Args:
        image: uint8 (height, width, channels), with 1 or 3 channels.
    """
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _choice(description: str, width: str) -> Dropdown:
    return Dropdown(description=description, style={"description_width": "initial"}, layout=Layout(width=width))


def _row(*widgets: Any) -> HBox:
    return HBox(widgets, layout=Layout(flex_flow="row wrap"))


def _offer(choice: Dropdown, options: Iterable[Any], wanted: Any = None) -> None:
    """Set the options of a list, and its value: the present one if it is an option, else `wanted`, else the first."""
    options = list(options)
    values = [option[1] if isinstance(option, tuple) else option for option in options]
    value = next((value for value in (choice.value, wanted) if value in values), values[0] if values else None)
    choice.options = options
    choice.value = value


class _Panel:
    """Lists whose options depend on each other. After a change of any list, `update` sets the options of all."""

    def __init__(self, *lists: Dropdown) -> None:
        self._busy = False
        self._calls: list[Callable[[], None]] = []
        for choice in lists:
            choice.observe(lambda _: self.update(), "value")

    def update(self) -> None:
        """Set the options and show the chosen results; changes by this method do not call it again."""
        if not self._busy:
            self._busy = True
            try:
                self._refresh()
                for call in self._calls:
                    call()
            finally:
                self._busy = False

    def when_changed(self, call: Callable[[], None]) -> None:
        """Call a function now and after every change.

        Args:
            call: the function.
        """
        self._calls.append(call)
        call()

    def _refresh(self) -> None:
        raise NotImplementedError


class Choices(_Panel):
    """Lists for study, dataset and comparison.

    Attributes:
        lists: the widgets, which every part of the notebook shows.
        results: the rows of the chosen dataset and comparison, from `hloss.study.results.read_results`.
    """

    def __init__(self, study: str, dataset: str, comparison: str) -> None:
        """Create the lists with these choices; an unknown name is replaced by the first known one.

        Args:
            study: name of a study with results.
            dataset: name of a dataset of the study.
            comparison: name of a comparison of the study.
        """
        self.study, self.dataset, self.comparison = (
            _choice(name, "220px") for name in ("study", "dataset", "comparison")
        )
        super().__init__(self.study, self.dataset, self.comparison)
        self.lists = _row(self.study, self.dataset, self.comparison)
        self._first = study, dataset, comparison
        self._files = explore.studies(project_path("reports"))
        self.update()

    def _refresh(self) -> None:
        study, dataset, comparison = self._first
        _offer(self.study, self._files, study)
        file = self._files[self.study.value]
        table = _results_of(file, tuple((made, made.stat().st_mtime) for made in parts_of(file) or [file]))
        _offer(self.dataset, table.loc[table["complete"], "dataset"].unique(), dataset)
        of_dataset = select_results(table, dataset=self.dataset.value)
        _offer(self.comparison, explore.comparisons(of_dataset), comparison)
        self.results = select_results(of_dataset, comparison=self.comparison.value)


@lru_cache(maxsize=8)
def _results_of(file: Path, changed: tuple[tuple[Path, float], ...]) -> pd.DataFrame:
    """The results in a file, or in its parts, that were last changed at these times."""
    return read_results(file)


class Curves(_Panel):
    """Curves of the chosen comparison, with lists for axis, metric and K.

    Attributes:
        view: the widget to display.
        figure: the figure in it.
    """

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self.axis, self.metric, self.k = _choice("axis", "220px"), _choice("metric", "220px"), _choice("K", "100px")
        super().__init__(self.axis, self.metric, self.k)
        self.figure: Figure | None = None
        choices.when_changed(self.update)
        self.view = VBox([choices.lists, _row(self.axis, self.metric, self.k), self.figure])

    def _refresh(self) -> None:
        results = self._choices.results
        metrics = explore.metric_columns(results)
        _offer(self.axis, explore.axes(results))
        _offer(self.metric, metrics)
        _offer(self.k, [(str(k), k) for k in metrics[self.metric.value] if k])
        self.metric.disabled = self.axis.value in (explore.OVER_K, explore.ITERATION)
        self.k.disabled = self.metric.disabled or not self.k.options
        points = explore.curves(results, self.axis.value, metrics[self.metric.value][self.k.value])
        traces = list(_traces(points, self.axis.value))
        layout = self._axes(points) | {"showlegend": points["curve"].nunique() > 1}
        if self.figure is None:
            self.figure = Figure(traces, _layout(height=430).update(layout))
        else:
            self.figure.data = []
            self.figure.add_traces(traces)
            self.figure.update_layout(layout)

    def _axes(self, points: pd.DataFrame) -> dict[str, Any]:
        """Titles and scales of the axes."""
        axis, metric = self.axis.value, f"test {self.metric.value}"
        if self.k.value:
            metric = metric.replace("@K", f"@{self.k.value}")
        metric = {explore.OVER_K: f"test {explore.RECALL}", explore.ITERATION: explore.VALIDATION}.get(axis, metric)
        spread = "range over seeds" if axis == explore.ITERATION else "95 % interval"
        title = f"{self._choices.dataset.value}: {self._choices.comparison.value}  (mean over seeds, {spread})"
        value = {"title": {"text": f"{metric} (%)"}, "type": "linear", "tickmode": "auto", "autorange": True}
        if axis == explore.METHOD:
            names = {"title": {"text": ""}, "type": "category", "tickmode": "auto", "autorange": "reversed"}
            return {"title": {"text": title}, "xaxis": value, "yaxis": names}
        return {"title": {"text": title}, "xaxis": _scale(axis, points["x"]), "yaxis": value}


def _scale(axis: str, values: pd.Series) -> dict[str, Any]:
    """A horizontal axis with a tick per value if these are few, logarithmic if they span a factor of five."""
    ticks = np.unique(values.astype(float))
    unit = {explore.LENGTH: " (iterations)", explore.OVER_K: " (number of nearest images)"}.get(axis, "")
    logarithmic = ticks[0] > 0 and ticks[-1] >= 5 * ticks[0] and axis != explore.ITERATION
    few = {"tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    scale = {"title": {"text": axis + unit}, "type": "log" if logarithmic else "linear", "autorange": True}
    return scale | (few if len(ticks) <= 12 else {"tickmode": "auto"})


def _traces(points: pd.DataFrame, axis: str) -> Iterable[go.Scatter]:
    """One line with a band per curve; one point with an interval if a curve has one point, or the axis is `METHOD`."""
    for number, (name, rows) in enumerate(points.groupby("curve", sort=False)):
        color = COLORS[number % len(COLORS)]
        bounds = {"array": rows["high"] - rows["mean"], "arrayminus": rows["mean"] - rows["low"], "symmetric": False}
        seeds = {"customdata": rows[["low", "high", "n"]].round(1), "name": name, "legendgroup": name}
        marker = {"color": color, "size": 8, "symbol": SYMBOLS[number % len(SYMBOLS)]}
        said = "%{customdata[0]} to %{customdata[1]}, n = %{customdata[2]}"
        if axis == explore.METHOD:
            text = f"%{{y}}<br>%{{x:.1f}} % ({said})<extra></extra>"
            yield go.Scatter(
                x=rows["mean"], y=rows["x"], mode="markers", marker=marker, error_x=bounds, hovertemplate=text, **seeds
            )
            continue
        if len(rows) > 1 and rows["low"].notna().all():
            yield go.Scatter(
                x=[*rows["x"], *rows["x"][::-1]], y=[*rows["high"], *rows["low"][::-1]], fill="toself", mode="lines",
                line={"width": 0}, fillcolor=color.replace("rgb", "rgba").replace(")", ", 0.13)"), hoverinfo="skip",
                legendgroup=name, showlegend=False,
            )  # fmt: skip
        yield go.Scatter(
            x=rows["x"], y=rows["mean"], mode="lines+markers", marker=marker, **seeds,
            line={"color": color, "dash": DASHES[number // len(COLORS) % len(DASHES)]},
            error_y=bounds if len(rows) == 1 else None,
            hovertemplate=f"{name}<br>%{{x}}: %{{y:.1f}} % ({said})<extra></extra>",
        )  # fmt: skip


def _layout(**settings: Any) -> go.Layout:
    grid = {"gridcolor": "#eaeef2", "zeroline": False, "linecolor": "#d0d7de", "automargin": True}
    return go.Layout(
        template="none", font=FONT, autosize=True, paper_bgcolor="white", plot_bgcolor="white", xaxis=grid, yaxis=grid,
        title={"font": {"size": 14}, "x": 0.01, "xanchor": "left"}, margin={"l": 60, "r": 20, "t": 45, "b": 50},
        hoverlabel={"bgcolor": "white"}, **settings,
    )  # fmt: skip


class Neighbors(_Panel):
    """The nearest images of a query under two runs with the same seed, with lists for runs, seed and query.

    Attributes:
        view: the widget to display.
        choices: the lists above.
        dataset: the dataset of the runs; None if it is not prepared.
        galleries: embeddings of the left and the right run; None for a run without them.
        shown: the neighbourhoods of the query, left and right.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.left, self.right, self.seed = _choice("left", "300px"), _choice("right", "300px"), _choice("seed", "100px")
        self.which, self.query = _choice("queries", "220px"), _choice("query", "260px")
        super().__init__(self.left, self.right, self.seed, self.which, self.query)
        self.panel, self.note = HTML(), HTML()
        lists = [_row(self.left, self.right, self.seed), _row(self.which, self.query)]
        self.view = VBox([choices.lists, *lists, self.panel, self.note])
        self._picked: int | None = None
        choices.when_changed(self.update)

    def pick(self, query: int) -> None:
        """Choose a query, which need not be in the list.

        Args:
            query: row of the image in the dataset's index.
        """
        self._picked, self._busy = query, True
        self.query.options = [*self.query.options, ("", query)]
        self.query.value, self._busy = query, False
        self.update()

    def _refresh(self) -> None:
        runs = self._chosen_runs()
        self.dataset, problem = _opened(project_path("data") / runs[0]["split"])
        self.galleries = [_gallery_of(self.dataset, run) if self.dataset else None for run in runs]
        stored = [explore.stored_neighborhoods(run) for run in runs]
        _offer(self.which, [ALL, LEFT, RIGHT, NEITHER] if all(self.galleries) else [ALL])
        _offer(self.query, [(self._name(row), row) for row in self._queries(list(stored[0]))])
        row = self.query.value
        self.shown = [
            gallery.nearest(row) if gallery else known[row]
            for gallery, known in zip(self.galleries, stored, strict=True)
        ]
        self.panel.value = self._pictures(self.dataset.images, runs) if self.dataset else ""
        self.note.value = _note(problem or _lacking(runs, self.galleries))

    def _chosen_runs(self) -> list[dict[str, Any]]:
        """The left and the right run."""
        complete = at_length(self.choices.results)
        complete = complete[complete["complete"]]
        methods = list(complete["method"].unique())
        _offer(self.left, methods)
        _offer(self.right, methods, methods[min(1, len(methods) - 1)])
        of = {method: complete[complete["method"] == method].set_index("seed") for method in methods}
        seeds = of[self.left.value].index.intersection(of[self.right.value].index)
        _offer(self.seed, seeds if len(seeds) else of[self.left.value].index)
        right = self.right.value if len(seeds) else self.left.value
        return [of[method].loc[self.seed.value].to_dict() for method in (self.left.value, right)]

    def _queries(self, stored: list[int]) -> list[int]:
        """Rows of the queries in the list: those that pass the filter, first those with stored neighbours."""
        galleries = [gallery for gallery in self.galleries if gallery]
        if len(galleries) < 2:
            return stored
        left, right = (gallery.ranks for gallery in galleries)
        wanted = {LEFT: (True, False), RIGHT: (False, True), NEITHER: (False, False)}.get(self.which.value)
        passed = [row for row in left if wanted is None or (left[row] == 1, right.get(row) == 1) == wanted]
        first = [row for row in stored if row in set(passed)]
        if len(passed) > MOST_QUERIES:
            passed = [passed[place] for place in np.linspace(0, len(passed) - 1, MOST_QUERIES).astype(int)]
        picked = [self._picked] if self._picked is not None and self._picked in galleries[0].rows else []
        return list(dict.fromkeys([*first, *passed, *picked])) or stored

    def _name(self, row: int) -> str:
        return f"image {row}, class {self.dataset.index.label.iloc[row]}" if self.dataset else f"image {row}"

    def _pictures(self, images: np.ndarray, runs: list[dict[str, Any]]) -> str:
        """HTML of the query and of both sets of neighbours."""
        query = _framed(images[self.shown[0].query], "query", "#57606a", 120)
        blocks = [f"<div><b>query</b><div style='margin-top:8px'>{query}</div></div>"]
        for run, found in zip(runs, self.shown, strict=True):
            of = zip(found.rows, found.hits, strict=True)
            framed = "".join(
                _framed(images[row], f"{place}: {'hit' if hit else 'miss'}, image {row}", HIT if hit else MISS, 84)
                for place, (row, hit) in enumerate(of, 1)
            )
            title = f"<b>{html.escape(run['method'])}</b>: {sum(found.hits)} hits of {len(found.hits)}"
            total = f"test Recall@1 {run['recall@1']:.1f} %, run {run['run_id']}"
            grid = "display:grid;grid-template-columns:repeat(4,auto);gap:6px;margin-top:8px;width:max-content"
            blocks.append(f"<div>{title}<br><small>{total}</small><div style='{grid}'>{framed}</div></div>")
        return f"<div style='display:flex;flex-wrap:wrap;gap:36px;line-height:1.4;margin:8px 0'>{''.join(blocks)}</div>"


def _framed(image: np.ndarray, text: str, color: str, size: int) -> str:
    """HTML of an image in a coloured frame; hits have a tick and misses a cross, too."""
    mark = {HIT: "✓", MISS: "✗"}.get(color, "")
    badge = f"position:absolute;right:0;bottom:0;background:{color};color:white;padding:0 4px;font-size:12px"
    pixels = f"width:{size}px;height:{size}px;object-fit:contain;image-rendering:pixelated;display:block"
    return (
        f"<span style='position:relative;display:inline-block;border:3px solid {color}' title='{text}'>"
        f"<img alt='{text}' style='{pixels}' src='{picture(image)}'><span style='{badge}'>{mark}</span></span>"
    )


def _opened(folder: Path) -> tuple[Dataset | None, str]:
    """The dataset, or None and why it cannot be opened."""
    try:
        return _dataset_in(folder), ""
    except DatasetError as error:
        return None, f"No images: {error}."


@lru_cache(maxsize=4)
def _dataset_in(folder: Path) -> Dataset:
    return open_dataset(folder)


_GALLERIES: dict[Path, Gallery] = {}


def _gallery_of(dataset: Dataset, run: Mapping[str, Any]) -> Gallery | None:
    """`explore.open_gallery`, remembered for the last runs."""
    folder = explore.run_folder(run)
    if folder not in _GALLERIES:
        if len(_GALLERIES) > 8:
            _GALLERIES.clear()
        if (gallery := explore.open_gallery(dataset, run)) is None:
            return None
        _GALLERIES[folder] = gallery
    return _GALLERIES[folder]


def _lacking(runs: list[dict[str, Any]], galleries: list[Gallery | None]) -> str:
    """What is missing, and the command that makes it; "" if nothing is."""
    lacking = [run for run, gallery in zip(runs, galleries, strict=True) if gallery is None]
    if not lacking:
        return ""
    folder = f"runs/{lacking[0]['study']}/{lacking[0]['run_id']}"
    return (
        f"This study has no embeddings here: <code>{folder}/embeddings.npy</code> does not exist. The committed sample "
        "contains results only. You can pick the few queries whose neighbours the results contain. There is no "
        "map. <code>make study STUDY=quick</code> trains 11 networks in some minutes and keeps their embeddings. Then "
        "run all cells again and choose <b>quick</b> as the study."
    )


def _note(text: str) -> str:
    style = "border-left:4px solid #9a6700;background:#fff8c5;color:#1f2328;padding:8px 12px;line-height:1.5"
    return f"<div style='{style};max-width:900px'>{text}</div>" if text else ""


class Map:
    """The test images on the first two principal components of their embeddings, with the picture under the mouse.

    A click on a point makes it the query of `Neighbors`.

    Attributes:
        view: the widget to display.
        figure: the map, with the traces `NAMES`; None until a run with embeddings is chosen.
        hovered: the picture of the image under the mouse.
    """

    def __init__(self, neighbors: Neighbors) -> None:
        self._neighbors = neighbors
        self.side = Dropdown(description="run", options=["left", "right"], layout=Layout(width="220px"))
        self.side.observe(lambda _: self.update(), "value")
        self.figure: Figure | None = None
        self.hovered, self.note, self._beside = HTML(), HTML(), HBox()
        self._rows: dict[str, list[int]] = {}
        lists = _row(neighbors.left, neighbors.right, self.side)
        self.view = VBox([neighbors.choices.lists, lists, self._beside, self.note])
        neighbors.when_changed(self.update)

    def update(self) -> None:
        """Draw the map of the chosen run and mark the query."""
        place = self.side.index
        gallery, found = self._neighbors.galleries[place], self._neighbors.shown[place]
        self.note.value = self._neighbors.note.value
        if gallery is None:
            self._beside.children = ()
            return
        points, shares = explore.projection(gallery)
        hit = np.array([gallery.ranks.get(row) == 1 for row in gallery.rows.tolist()])
        drawn = np.isin(np.arange(len(hit)), gallery.shown())
        same = (gallery.labels == gallery.labels[gallery.rows == found.query]).numpy()
        marked = [drawn & hit, drawn & ~hit, same, np.isin(gallery.rows, found.rows), gallery.rows == found.query]
        method = (self._neighbors.left, self._neighbors.right)[place].value
        layout: dict[str, Any] = {"title": {"text": f"{method}: {drawn.sum():,} of {len(hit):,} test images"}}
        for name, number in (("xaxis", 0), ("yaxis", 1)):
            text = f"principal component {number + 1} ({100 * shares[number]:.0f} % of the variance)"
            layout[name] = {"title": {"text": text}}
        self._rows = {name: gallery.rows[mask].tolist() for name, mask in zip(NAMES, marked, strict=True)}
        self._draw([points[mask].T for mask in marked], layout)
        self._show(found.query)

    def _draw(self, places: list[np.ndarray], layout: dict[str, Any]) -> None:
        """Draw the points of each trace, with these titles."""
        if self.figure is None:
            base = _layout(height=520, hovermode="closest")
            self.figure = Figure(list(_map_traces(places)), base.update(layout))
            for trace in self.figure.data[:2]:
                trace.on_hover(self._hover)
                trace.on_click(self._click)
        else:
            with self.figure.batch_update():
                for trace, place in zip(self.figure.data, places, strict=True):
                    trace.x, trace.y = place
                self.figure.update_layout(layout)
        if not self._beside.children:
            self._beside.children = (VBox([self.figure], layout=Layout(flex="1 1 auto", min_width="0")), self.hovered)

    def _hover(self, trace: go.Scatter, points: Any, state: Any) -> None:
        if points.point_inds:
            self._show(self._rows[trace.name][points.point_inds[0]])

    def _click(self, trace: go.Scatter, points: Any, state: Any) -> None:
        if points.point_inds:
            self._neighbors.pick(self._rows[trace.name][points.point_inds[0]])

    def _show(self, row: int) -> None:
        """Show the picture of an image."""
        dataset = self._neighbors.dataset
        assert dataset is not None  # there are no embeddings without it
        image = dataset.index.iloc[row]
        framed = _framed(dataset.images[row], f"image {row}", "#57606a", 160)
        said = f"<b>image {row}</b><br>class {image['label']}<br><small>{html.escape(str(image['source']))}</small>"
        self.hovered.value = f"<div style='width:190px;margin:48px 12px;line-height:1.5'>{framed}<br>{said}</div>"


def _map_traces(places: list[np.ndarray]) -> Iterable[go.Scatter]:
    """Traces of a map at the given places; the marks above the points do not react to the mouse."""
    ring = {"symbol": "circle-open", "line": {"width": 2}}
    markers: list[dict[str, Any]] = [
        {"color": POSITIVE, "size": 5, "opacity": 0.6},
        {"color": NEGATIVE, "size": 5, "opacity": 0.6},
        {"color": "#0969da", "size": 11, **ring},
        {"color": "#1f2328", "size": 15, **ring},
        {"color": "#bf3989", "size": 17, "symbol": "star", "line": {"color": "white", "width": 1}},
    ]
    for number, (name, marker, (x, y)) in enumerate(zip(NAMES, markers, places, strict=True)):
        hover = "none" if number < 2 else "skip"
        yield go.Scatter(x=x, y=y, name=name, mode="markers", marker=marker, hoverinfo=hover)
