"""The head of a report: its question, data and hardware, the answer, and the figure of the losses."""

import html
import math
from typing import Any

import pandas as pd

from hloss.study.answer import TUNED, Answer, Ranking, data_words, few, most_seeds
from hloss.study.estimates import mean_over_runs
from hloss.study.intervals import Interval, Scale, axis_plot, mean_plot
from hloss.study.results import distinct_runs, lengths_in
from hloss.study.spec import LOSS_COMPARISONS
from hloss.study.statistics import shown_interval
from hloss.study.tables import duration, listed

QUESTION = (
    "Question: which claims of the paper (Ustinova & Lempitsky, NIPS 2016) do these runs support, and which loss "
    "retrieves best?"
)


def facts(results: pd.DataFrame) -> str:
    """Data, number of runs (and whether all are complete), lengths, time and hardware in one line of text.

    Args:
        results: the table of `hloss.study.results.read_results`.
    """
    complete = results[results["complete"]]
    runs = distinct_runs(complete)
    trained = complete[complete["length"] > 0]
    lengths = listed([f"{length:,}" for length in _usual_lengths(trained)])
    n_trained = len(distinct_runs(trained))
    number = f"all {len(runs):,} planned runs" if results["complete"].all() else f"{len(runs):,} runs so far"
    parts = [f"Data: {data_words(results)}", f"{number}, of which {n_trained:,} train a network"]
    parts += [f"at most {few(most_seeds(trained))} per method"] if len(trained) else []
    parts += [f"training of {lengths} iterations"] if lengths else []
    parts += [f"{duration(runs['training_seconds'].sum())} of training on {hardware(runs)}"]
    return " · ".join(parts)


def _usual_lengths(trained: pd.DataFrame) -> list[int]:
    """The lengths of the comparisons of losses, or all lengths if the study has none."""
    losses = trained[trained["comparison"].isin(LOSS_COMPARISONS)]
    return lengths_in(losses if len(losses) else trained)


def hardware(runs: pd.DataFrame) -> str:
    """The devices of runs, as in "AMD EPYC 7763, 1 thread per run".

    Args:
        runs: rows with the column device and, if known, processor and threads.
    """
    known = runs.reindex(columns=["device", "processor", "threads"])
    names = []
    for device, processor, threads in known.drop_duplicates().itertuples(index=False, name=None):
        on_cpu = device in ("x86_64", "aarch64", "arm64")
        name = processor if on_cpu and isinstance(processor, str) and processor else f"{device}{' CPU' * on_cpu}"
        each = f", {int(threads)} thread{'s' * (int(threads) > 1)} per run" if on_cpu and threads == threads else ""
        names.append(f"{name}{each}")
    return " and ".join(dict.fromkeys(names))


def losses_figure(of_lengths: list[Ranking], caption: str) -> str:
    """HTML of the losses of a dataset with their Recall@1, as a figure with one line per loss.

    Args:
        of_lengths: the order after each length, the shortest first.
        caption: HTML of the caption.
    """
    last, before = of_lengths[-1], of_lengths[:-1]
    earlier = {
        method: [_recall_of(ranking, method) for ranking in before] for method in last.rows["method"]
    }  # fmt: skip
    bounds = [*last.rows["recall@1"], *last.rows["recall@1 low"], *last.rows["recall@1 high"]]
    scale = Scale([*bounds, *(value for values in earlier.values() for value in values)])
    with_seeds = last.rows["n"].nunique() > 1
    lines = [_loss_line(row, scale, earlier[row["method"]], before, with_seeds) for row in last.rows.to_dict("records")]
    recall = f"test Recall@1 on {html.escape(last.dataset)} (%)"
    head = f'<tr><th scope="col">loss</th><th scope="col" class="plot">{recall}</th>'
    head += '<th scope="col" class="number">mean<span class="narrow" hidden>95 % CI</span></th>'
    head += '<th scope="col" class="number wide">95 % CI</th>'
    head += '<th scope="col" class="number">seeds</th>' * with_seeds + "</tr>"
    foot = f'<tr><td></td><td class="plot">{axis_plot(scale)}</td><td></td><td class="wide"></td>'
    foot += "<td></td>" * with_seeds + "</tr>"
    table = f'<table class="losses"><thead>{head}</thead><tbody>{"".join(lines)}</tbody><tfoot>{foot}</tfoot></table>'
    return f'<figure class="losses{" with-seeds" * with_seeds}">{table}{caption}</figure>'


def _recall_of(ranking: Ranking, method: str) -> float:
    found = ranking.rows.loc[ranking.rows["method"] == method, "recall@1"]
    return float(found.iloc[0]) if len(found) else math.nan


def _loss_line(row: dict[Any, Any], scale: Scale, earlier: list[float], before: list[Ranking], with_seeds: bool) -> str:
    interval = shown_interval(row["recall@1 low"], row["recall@1 high"])
    mean = Interval(row["recall@1"], row["recall@1 low"], row["recall@1 high"], row["still improving"] > 0)
    steps = "".join(
        f"; after {r.length:,} iterations {value:.1f} %"
        for r, value in zip(before, earlier, strict=True) if not math.isnan(value)
    )  # fmt: skip
    seeds = f'<td class="number">{row["n"]}</td>' * with_seeds
    words = f"{row['method']}: {row['recall@1']:.1f} %, 95 % CI {interval}{steps}"
    return (
        f'<tr><th scope="row">{html.escape(row["method"])}</th>'
        f'<td class="plot">{mean_plot(mean, scale, earlier, words)}</td>'
        f'<td class="number">{row["recall@1"]:.1f}<span class="narrow" hidden>{interval}</span></td>'
        f'<td class="number wide">{interval}</td>{seeds}</tr>'
    )


def losses_caption(of_lengths: list[Ranking]) -> str:
    """Caption of `losses_figure`.

    Args:
        of_lengths: the order after each length, the shortest first.
    """
    last, before = of_lengths[-1], of_lengths[:-1]
    numbers = [int(n) for n in last.rows["n"].unique()]
    setting = "settings tuned for each loss on validation classes" if last.comparison == TUNED else "one fixed setting"
    text = (
        f"Test Recall@1 (%) of the losses on {last.dataset} after {last.length:,} iterations, {setting}: mean over "
        f"{few(numbers[0]) if len(numbers) == 1 else 'seeds'} with its 95 % confidence interval over "
        f"{mean_over_runs(last.of(last.rows['method'].iloc[0])).varies}"
        f"{', not over the choice of the settings' * (last.comparison == TUNED)}."
    )
    if before:
        lengths = listed([f"{ranking.length:,}" for ranking in before])
        text += f" Small points: after {lengths} iterations, the shortest the smallest."
    if (last.rows["still improving"] > 0).any():
        text += " Open circle: a run is still improving (best validation in the last tenth of the length)."
    if last.absent:
        text += f" Without a complete run: {listed(last.absent)}."
    return text


def head_html(title: str, results: pd.DataFrame, told: list[Answer], figures: list[str]) -> str:
    """HTML of the head of a report.

    Args:
        title: title of the study.
        results: the table of `hloss.study.results.read_results`.
        told: the answer, from `hloss.study.answer.answers`.
        figures: HTML of the figures, from `losses_figure`.
    """
    bold = [f"<strong>{html.escape(part.short)}</strong> " * bool(part.short) for part in told]
    items = [f"<li>{short}{html.escape(part.text)}</li>" for short, part in zip(bold, told, strict=True)]
    return "\n".join(
        [
            f"<header><h1>{html.escape(title)}</h1>",
            f'<p class="soft">{html.escape(QUESTION)}<br>{html.escape(facts(results))}</p>',
            f'<ul class="answer">{"".join(items)}</ul>',
            f'<div class="figures">{"".join(figures)}</div></header>',
        ]
    )
