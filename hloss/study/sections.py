"""Sections of the report of a study; notebooks/90_report.ipynb shows them in order."""

import json
from functools import cached_property
from typing import Any

import pandas as pd
from IPython.display import Markdown, display

from hloss.runs.datasets import open_dataset
from hloss.runs.errors import DatasetError
from hloss.runs.files import atomic_write, project_path
from hloss.study import captions, notes, plots
from hloss.study.alt_texts import (
    describe_comparison,
    describe_differences,
    describe_recall_by_length,
    describe_recall_curves,
    describe_recall_over_iterations,
)
from hloss.study.answer import Ranking, answers, best_comparison, rankings
from hloss.study.claims import judge, overlap
from hloss.study.criteria import NOT_RUN
from hloss.study.difficulty import changes, differences, in_words
from hloss.study.exhibits import Exhibits
from hloss.study.head import head_html, losses_caption, losses_figure
from hloss.study.levels import levels_of
from hloss.study.published import PROTOCOL, SHOWN, compare_with_published, published_points
from hloss.study.report import run_links
from hloss.study.results import (
    MADE_BY,
    at_length,
    better_settings,
    chosen_settings,
    distinct_runs,
    grid_recalls,
    histories,
    lengths_in,
    read_results,
    recall_names,
    recalls_over_k,
)
from hloss.study.spec import DIFFICULTY, LOSS_COMPARISONS, OF_TUNING
from hloss.study.statistics import headline, shown_interval, summary
from hloss.study.tables import duration
from hloss.study.verify import origin


class Report:
    """The results of a study, and the sections that show them.

    Args:
        results_file: reports/STUDY/results.parquet.
        folder: folder of the report, from the project's root, for claims.csv, summary.csv, the figures and the tables;
            "": write nothing.
    """

    def __init__(self, results_file: str, folder: str) -> None:
        self.file, self.folder = results_file, folder
        self.all_lengths = read_results(project_path(results_file))
        self.results = at_length(self.all_lengths)  # the longest length of each method
        self.complete = self.results[self.results["complete"]]
        self.missing = self.results[~self.results["complete"]]
        self.runs = distinct_runs(self.all_lengths[self.all_lengths["complete"]])
        others = self.complete[self.complete["comparison"] != DIFFICULTY]
        self.by_dataset = dict(list(others.groupby("dataset", sort=False)))  # without the comparison of datasets
        self.show = Exhibits(folder, run_links(self.runs, folder))
        if folder:
            claims = self.board.drop(columns="parts")  # the column evidence has them as text
            for name, table in (("summary", self.table_of_lengths), ("claims", claims)):
                file = project_path(folder) / f"{name}.csv"
                atomic_write(file, lambda part, table=table: table.to_csv(part, index=False))  # type: ignore[misc]

    @cached_property
    def board(self) -> pd.DataFrame:
        """The verdicts on the claims."""
        cost = project_path(self.file).with_name("loss_cost.csv")
        return judge(self.all_lengths, pd.read_csv(cost) if cost.exists() else None)

    @cached_property
    def table(self) -> pd.DataFrame:
        """Means at the longest length of each method."""
        return at_length(self.table_of_lengths)

    @cached_property
    def table_of_lengths(self) -> pd.DataFrame:
        """Means at all lengths."""
        return summary(self.all_lengths, recall_names(self.results))

    @cached_property
    def losses(self) -> dict[str, pd.DataFrame]:
        """Dataset -> runs of its losses: the tuned ones if all of them are complete."""
        found = {}
        for dataset, rows in self.by_dataset.items():
            chosen = rows[rows["comparison"] == best_comparison(self.results, dataset)]
            if len(chosen):
                found[dataset] = chosen
        return found

    def name(self, dataset: str, name: str) -> str:
        """Name of a file; it begins with the dataset if there are several.

        Args:
            dataset: name of the dataset.
            name: name of the figure or table.
        """
        return f"{dataset} {name}" if len(self.by_dataset) > 1 else name

    def _rankings(self) -> list[list[Ranking]]:
        found = (rankings(self.all_lengths, self.table_of_lengths, dataset) for dataset in self.by_dataset)
        return [of_lengths for of_lengths in found if of_lengths]

    def head(self) -> str:
        """HTML of the head: the question, the answer and the figure of the losses."""
        figures = [losses_figure(r, self.show.caption(losses_caption(r))) for r in self._rankings()]
        told = answers(self.all_lengths, self.table_of_lengths, self.board)
        return head_html(self.all_lengths["title"].iloc[0], self.all_lengths, told, figures)

    def verdicts(self) -> None:
        """Table of the verdicts at each length."""
        shown = self.board[self.board["verdict"] != NOT_RUN]
        columns = ["claim", "verdict", "difference", "low", "high", "unit", "n", "length", "holm", "confidence"]
        columns += ["dataset", "comparison", "still improving"]
        if len(shown):
            shown = shown.assign(holm=shown["holm"].where(shown["p holds"].notna(), "no test"))
            shown = shown[columns].rename(columns={"holm": "Holm"}).round(2)
            self.show.table(shown, "verdicts", captions.VERDICTS)

    def losses_tables(self) -> None:
        """Table of the losses of each dataset."""
        for dataset, rows in self.by_dataset.items():
            metrics = recall_names(rows)[:4]
            shown = self._headline(self.table[self.table["dataset"] == dataset], LOSS_COMPARISONS, metrics)
            if len(shown):
                self.show.table(shown, self.name(dataset, "losses"), captions.LOSSES.format(dataset=dataset))

    @staticmethod
    def _headline(table: pd.DataFrame, comparisons: tuple[str, ...], metrics: list[str]) -> pd.DataFrame:
        """The means of one dataset with the runs of each."""
        shown = headline(table, comparisons, metrics).drop(columns="dataset")
        return shown.assign(run_ids=table.loc[shown.index, "run_ids"])

    def published(self) -> None:
        """Tables of published values beside those of this study."""
        beside = pd.concat([compare_with_published(self._of(name)) for name in SHOWN])
        beside = beside.drop_duplicates(["dataset", "method", "metric", "source", "published", "run_ids"])
        for other, rows in beside.groupby(beside["match"] == PROTOCOL):
            caption = captions.PUBLISHED.format(kind="other protocols" if other else "the same protocol")
            display(Markdown("Other protocols:" if other else "Same protocol:"))
            self.show.table(rows.round(1), "published other" if other else "published", caption)
        if beside.empty:
            display(Markdown("There are no published values for this data."))

    def _of(self, comparison: str) -> pd.DataFrame:
        return self.results[self.results["comparison"] == comparison]

    def losses_figures(self) -> None:
        """Figures of the losses: Recall@1 at one length and over the lengths, Recall@K."""
        for dataset, rows in self.by_dataset.items():
            for comparison in LOSS_COMPARISONS:
                chosen = rows[rows["comparison"] == comparison]
                if len(chosen):
                    self._comparison(dataset, comparison, chosen)
                    self._by_length(dataset, comparison)
        for dataset, chosen in self.losses.items():
            what = "the tuned losses" if chosen["comparison"].iloc[0] != LOSS_COMPARISONS[0] else "the losses"
            self._recall_curves(dataset, chosen, what, "recall_at_k", "Figures 3 and 4")

    def _comparison(self, dataset: str, comparison: str, chosen: pd.DataFrame) -> None:
        means, of_lengths = (t[t["dataset"] == dataset] for t in (self.table, self.table_of_lengths))
        caption = captions.COMPARISON.format(
            comparison=comparison,
            dataset=dataset,
            paper=captions.of_paper(captions.PAPER.get(comparison)),
            drawn=captions.DRAWN[levels_of(chosen).kind],
        )
        figure = plots.comparison(comparison, chosen, means, of_lengths)
        alt = describe_comparison(comparison, chosen, means)
        self.show.figure(figure, self.name(dataset, comparison), caption, alt)

    def _by_length(self, dataset: str, comparison: str) -> None:
        of_lengths = self.table_of_lengths[self.table_of_lengths["dataset"] == dataset]
        rows = of_lengths[(of_lengths["comparison"] == comparison) & (of_lengths["n"] > 0)]
        if len(lengths_in(rows)) > 1:
            caption = captions.BY_LENGTH.format(comparison=comparison, dataset=dataset)
            figure = plots.recall_by_length(comparison, of_lengths)
            alt = describe_recall_by_length(comparison, of_lengths)
            self.show.figure(figure, self.name(dataset, f"{comparison} by length"), caption, alt)

    def _recall_curves(self, dataset: str, chosen: pd.DataFrame, what: str, name: str, paper: str) -> None:
        recalls, points = recalls_over_k(chosen), published_points(compare_with_published(chosen))
        caption = captions.RECALL_AT_K.format(what=what, dataset=dataset, paper=captions.of_paper(paper))
        caption += captions.STARS * bool(points["method"].isin(recalls["method"]).any())
        alt = describe_recall_curves(recalls, points)
        self.show.figure(plots.recall_curves(recalls, points), self.name(dataset, name), caption, alt)

    def over_classes(self) -> None:
        """Table of one run per loss with its interval over test classes."""
        firsts = [rows[rows["seed"] == rows["seed"].min()] for rows in self.losses.values()]
        of_one_run = pd.concat([self.complete.head(0), *firsts])
        intervals = list(map(shown_interval, of_one_run["classes_low"], of_one_run["classes_high"]))
        shown = of_one_run[["dataset", "method", "seed", "run_id"]].assign(
            **{"recall@1 (%)": of_one_run["recall@1"].round(1), "95 % over classes": intervals}
        )
        if len(shown):
            self.show.table(shown, "over classes", captions.OVER_CLASSES)

    def tuned(self) -> None:
        """Tables of the settings that tuning chose, and of their grids."""
        tuned = chosen_settings(self.all_lengths)
        if len(tuned):
            self.show.table(tuned, "tuned settings", captions.TUNED)
        better = better_settings(self.all_lengths)
        if len(better):
            self.show.table(better.round(1), "better settings", captions.BETTER)
        recalls = grid_recalls(self.results)
        if len(recalls):
            self.show.table(recalls.round(1), "grids", captions.GRIDS)

    def ablations(self) -> None:
        """Figure and table of each other comparison."""
        for dataset, rows in self.by_dataset.items():
            for comparison, chosen in rows.groupby("comparison", sort=False):
                if comparison not in LOSS_COMPARISONS and not comparison.endswith(OF_TUNING):
                    self._ablation(dataset, comparison, chosen, recall_names(rows)[:4])

    def _ablation(self, dataset: str, comparison: str, chosen: pd.DataFrame, metrics: list[str]) -> None:
        name = self.name(dataset, comparison)
        display(Markdown(f"### {name}"))
        self._comparison(dataset, comparison, chosen)
        of_lengths = self.table_of_lengths[self.table_of_lengths["dataset"] == dataset]
        caption = captions.ABLATION.format(comparison=comparison, dataset=dataset)
        self.show.table(self._headline(of_lengths, (comparison,), metrics), name, caption)
        if paper := captions.PAPER.get(comparison):
            what = f"the comparison {comparison!r}"
            self._recall_curves(dataset, chosen, what, f"{comparison} recall_at_k", paper)

    def difficulty(self) -> None:
        """Text, figure and table of the losses on easier and harder data."""
        found = differences(self.all_lengths)
        if found.empty:
            return
        display(Markdown("### Difficulty of the data"))
        display(Markdown("\n".join(f"- **{short}** {text}" for short, text in in_words(self.all_lengths))))
        first, longest = found["first"].iloc[0], found[found["length"] == found["length"].max()]
        caption = captions.DIFFICULTY.format(first=first, length=found["length"].max())
        self.show.figure(plots.differences(longest), DIFFICULTY, caption, describe_differences(longest))
        table = pd.concat([found, changes(self.all_lengths)]).sort_values(["other", "length"], kind="stable")
        table["still improving"] = [f"{m} of {n}" for m, n in zip(table["still improving"], table["runs"], strict=True)]
        shown = table.drop(columns=["first", "runs"]).rename(columns={"first (%)": f"{first} (%)"}).round(1)
        self.show.table(shown, DIFFICULTY, captions.DIFFICULTIES.format(first=first))

    def similarities(self) -> None:
        """Figure of the densities of similarities before and after training."""
        for dataset, chosen in self.losses.items():
            trained = chosen["iterations"] > 0
            first = chosen[trained & (chosen["seed"] == chosen["seed"].min())].assign(shared=overlap)
            if len(first):
                figure = plots.similarity_densities(density_panels(first))
                caption = captions.SIMILARITIES.format(dataset=dataset)
                alt = "; ".join(f"{run.method}: {run.shared:.0f} % shared" for run in first.itertuples())
                self.show.figure(figure, self.name(dataset, "similarities"), caption, alt)

    def training(self) -> None:
        """Figure of the validation Recall@1 over the iterations."""
        for dataset, chosen in self.losses.items():
            curves = histories(chosen)
            if len(curves):
                of_same = self.all_lengths["comparison"].isin(chosen["comparison"])
                lengths = lengths_in(self.all_lengths[of_same & (self.all_lengths["dataset"] == dataset)])
                figure = plots.recall_over_iterations(curves, lengths)
                alt = describe_recall_over_iterations(curves, lengths)
                caption = captions.TRAINING.format(dataset=dataset)
                self.show.figure(figure, self.name(dataset, "training"), caption, alt)

    def panels(self) -> None:
        """Figure of queries and their nearest images, by the run with the best validation Recall@1."""
        for dataset, rows in self.by_dataset.items():
            trained = rows[rows["iterations"] > 0].sort_values("validation_recall@1", ascending=False, kind="stable")
            for best in trained.head(1).to_dict("records"):
                self._panel(dataset, best)

    def _panel(self, dataset: str, best: dict[Any, Any]) -> None:
        try:
            images = open_dataset(project_path("data") / best["split"]).images
        except DatasetError as error:
            display(Markdown(f"There is no figure of nearest images of `{dataset}`: {error}"))
            return
        panel, validated = json.loads(best["panel"]), best["validation_recall@1"] >= 0
        why = "the best validation Recall@1 of all runs" if validated else "trained without validation"
        caption = captions.PANEL.format(dataset=dataset, method=best["method"], run_id=best["run_id"], why=why)
        hits, shown = sum(map(sum, panel["hits"])), sum(map(len, panel["hits"]))
        alt = f"{len(panel['queries'])} queries; {hits} of {shown} neighbors have the class of their query"
        self.show.figure(plots.retrieval_panel(images, panel), self.name(dataset, "panel"), caption, alt)

    def basis(self) -> None:
        """Notes on data, intervals, lengths, missing runs and the code that made the results."""
        of_datasets = self.complete.groupby("dataset", sort=False)
        told = [notes.dataset_note(str(dataset), rows) for dataset, rows in of_datasets]
        told += [notes.lengths_note(self.all_lengths)]
        if len(self.missing):
            told += [f"**This study is not complete: {len(self.missing)} runs of its comparisons are missing.**"]
        told += [origin(self.runs, project_path(self.file)), notes.repeat_note(self.results, self.file)]
        display(Markdown("\n\n".join(filter(None, told))))

    def missing_runs(self) -> None:
        """Table of the runs without a result."""
        by_method = self.missing.groupby(["dataset", "comparison", "method"], sort=False)["seed"]
        gaps = by_method.agg(lambda seeds: ", ".join(map(str, seeds))).rename("missing seeds").reset_index()
        if len(gaps):
            self.show.table(gaps, "missing", "Runs without a result.")
        else:
            display(Markdown("Every run is complete."))

    def made_by(self) -> None:
        """Table of the code, the packages and the devices that made the runs."""
        made_by = [name for name in MADE_BY if name in self.runs]  # older results have fewer columns
        known = self.runs.astype({"threads": int} if "threads" in self.runs else {})  # missing rows make it floats
        made = known.groupby(made_by, dropna=False)["training_seconds"].agg(["size", "sum"]).reset_index()
        made["training"] = made.pop("sum").map(duration)
        self.show.table(made.rename(columns={"size": "runs"}), "made by", "Code, packages and devices of the runs.")

    def all_runs(self) -> None:
        """Settings and results of each run."""
        varied, fixed = notes.varied_settings(self.runs)
        display(Markdown("\n\n".join([*notes.preparation_notes(self.runs), fixed])))
        shown = self.runs[["run_id", "dataset", *varied, "seed"]].map(
            lambda v: f"{v:g}" if isinstance(v, float) and v == v else v
        )
        measured = ["length", "chosen_iteration", "still_improving", "validation_recall@1", *recall_names(self.results)]
        measured += [name for name in ("map", "r_precision", "map@r") if name in self.runs]
        measured += ["classes_low", "classes_high", "training_seconds"]
        comparisons = self.all_lengths.groupby("run_id")["comparison"].agg(
            lambda names: "; ".join(dict.fromkeys(names))
        )
        shown.insert(1, "comparison", self.runs["run_id"].map(comparisons))
        self.show.table(shown.join(self.runs[measured].round(2)), "runs", captions.RUNS)


def density_panels(first: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title -> density of a run: before training, then after training with each loss.

    Args:
        first: one run per loss, with the column shared (overlap of its densities, in %).
    """
    panels = {}
    for when, group in (("before", first.head(1)), ("after", first)):
        for _, run in group.iterrows():
            title = f"{run.method}: {run.shared:.0f} % shared" if when == "after" else "before training"
            density = {"nodes": run.nodes, "positive": run[f"positive_{when}"], "negative": run[f"negative_{when}"]}
            panels[title] = pd.DataFrame(density)
    return panels
