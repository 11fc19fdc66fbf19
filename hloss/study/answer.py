"""The answer of a study in a few sentences, made from its results.

They name the loss with the highest mean, its distance from the next, the effect of the training length, the verdicts on
the claims, and what limits them.
"""

import math
from typing import NamedTuple

import pandas as pd

from hloss.study.board import groups, verdict_counts
from hloss.study.criteria import NOT_RUN
from hloss.study.estimates import Estimate, paired_difference
from hloss.study.results import distinct_runs, lengths_in
from hloss.study.spec import LOSS_COMPARISONS
from hloss.study.statistics import shown_interval
from hloss.study.tables import signed

DATA = {
    "glyphs": "drawn characters (glyphs)",
    "cub": "birds (CUB-200-2011)",
    "sop": "products (Stanford Online Products)",
    "cuhk03": "persons (CUHK03)",
    "market1501": "persons (Market-1501)",
}
TUNED = LOSS_COMPARISONS[-1]
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Ranking(NamedTuple):
    """The trained losses of a dataset after one length, the best first.

    Attributes:
        dataset: the dataset.
        comparison: "losses" or "tuned losses".
        length: iterations of training.
        rows: rows of the table of `hloss.study.statistics.summary`, the highest Recall@1 first.
        runs: the complete runs of these rows.
    """

    dataset: str
    comparison: str
    length: int
    rows: pd.DataFrame
    runs: pd.DataFrame

    def of(self, method: str) -> pd.DataFrame:
        """The runs of a method."""
        return self.runs[self.runs["method"] == method]

    def difference(self, a: str, b: str) -> Estimate:
        """Recall@1 of one method minus that of another, in points."""
        return paired_difference(self.of(a), self.of(b))


def best_comparison(results: pd.DataFrame, dataset: str) -> str:
    """The comparison of losses to answer from: the tuned losses if they are complete, else those at a fixed setting.

    Args:
        results: the table of `hloss.study.results.read_results`.
        dataset: a dataset of the table.

    Returns:
        Its name; "" without a complete run of a comparison of losses.
    """
    best = ""
    for comparison in LOSS_COMPARISONS:
        runs = results[(results["dataset"] == dataset) & (results["comparison"] == comparison)]
        if runs["complete"].any() and (not best or runs["complete"].all()):
            best = comparison
    return best


def rankings(results: pd.DataFrame, table: pd.DataFrame, dataset: str) -> list[Ranking]:
    """The order of the trained losses of a dataset at each length, the shortest first.

    Args:
        results: the table of `hloss.study.results.read_results`.
        table: its `hloss.study.statistics.summary`.
        dataset: a dataset of the table.
    """
    comparison = best_comparison(results, dataset)
    named = (results["dataset"] == dataset) & (results["comparison"] == comparison)
    runs = results[named & results["complete"] & (results["length"] > 0)]
    rows = table[(table["dataset"] == dataset) & (table["comparison"] == comparison) & (table["n"] > 0)]
    return [
        Ranking(
            dataset,
            comparison,
            length,
            rows[rows["length"] == length].sort_values("recall@1", ascending=False, kind="stable"),
            runs[runs["length"] == length],
        )
        for length in lengths_in(runs)
    ]


def data_words(results: pd.DataFrame) -> str:
    """The datasets in words, as in "one dataset of drawn characters (glyphs)".

    Args:
        results: a table with the column dataset.
    """
    names = list(results["dataset"].unique())
    shown = " and ".join(DATA.get(name, name) for name in names)
    return f"one dataset, {shown}" if len(names) == 1 else f"{_word(len(names))} datasets, {shown}"


def sentences(results: pd.DataFrame, table: pd.DataFrame, board: pd.DataFrame) -> list[str]:
    """The answer of a study.

    Args:
        results: the table of `hloss.study.results.read_results`.
        table: its `hloss.study.statistics.summary`.
        board: the table of `hloss.study.claims.judge`.

    Returns:
        Sentences as plain text.
    """
    told = []
    for dataset in results["dataset"].unique():
        of_lengths = rankings(results, table, dataset)
        told += [leader_sentence(of_lengths[-1]), length_sentence(of_lengths)] if of_lengths else []
    told = told or ["No loss has a complete trained run yet, so there is no answer."]
    return [*told, claims_sentence(results, board), *_missing_sentence(results)]


def leader_sentence(ranking: Ranking) -> str:
    """Which loss leads after the longest length, by how much, and where the histogram loss stands.

    Args:
        ranking: the order of the losses after this length.
    """
    rows, seeds = ranking.rows, int(ranking.rows["n"].max())
    first = rows.iloc[0]
    setting = "with tuned settings" if ranking.comparison == TUNED else "at one fixed setting"
    where = f"After {ranking.length:,} iterations on {DATA.get(ranking.dataset, ranking.dataset)}, {setting},"
    recall = f"a test Recall@1 of {first['recall@1']:.1f} %{_interval_of(first, seeds)}"
    if len(rows) == 1:
        return f"{where} the only loss of this study, {first['method']}, has {recall}."
    second = rows.iloc[1]["method"]
    lead = ranking.difference(first["method"], second)
    low, high = lead.interval()
    if math.isnan(low):
        told = f"{first['method']} has the highest mean, {recall}, {lead.mean:.1f} points above {second}"
        return f"{where} {told}; with {few(lead.n)} per loss it is not known whether this is chance."
    distance = f"{signed(lead.mean, plus=True)} points (95 % CI {signed(low, plus=True)} to {signed(high, plus=True)})"
    if low > 0:
        told = f"{first['method']} leads: {recall}, {distance} from the next, {second}"
    else:
        told = (
            f"no loss clearly leads: {first['method']} has the highest mean, {recall}, and {second} is so close that "
        )
        told += f"the difference of {distance} can be chance"
    return f"{where} {told}{_histogram_place(ranking)}."


def _interval_of(row: pd.Series, seeds: int) -> str:
    of = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    known = pd.notna(row["recall@1 low"])
    interval = f"95 % CI {shown_interval(row['recall@1 low'], row['recall@1 high'])}, " if known else ""
    return f" ({interval}{of})"


def _histogram_place(ranking: Ranking) -> str:
    """Rank of the best histogram loss, and its difference from the first; empty if it is the first."""
    losses = ranking.runs.drop_duplicates("method").set_index("method")["loss"]
    methods = list(ranking.rows["method"])
    place = next((i for i, method in enumerate(methods) if losses[method] == "histogram"), 0)
    if place == 0 or (place == 1 and len(methods) > 1):  # the sentence already has its difference
        return ""
    behind = ranking.difference(methods[place], methods[0])
    low, high = behind.interval()
    interval = "" if math.isnan(low) else f" (95 % CI {signed(low, plus=True)} to {signed(high, plus=True)})"
    return f"; the histogram loss is number {place + 1} of {len(methods)}, {signed(behind.mean)} points{interval}"


def length_sentence(of_lengths: list[Ranking]) -> str:
    """Whether the order of the losses changes with the length, and how many runs are still improving.

    Args:
        of_lengths: the order after each length, the shortest first.
    """
    last = of_lengths[-1]
    runs = last.runs.drop_duplicates("run_id")
    improving = int(runs["still_improving"].sum())
    still = f"{improving} of these {len(runs)} runs are still improving" if improving else ""
    if len(of_lengths) == 1:
        only = "Only this training length was measured"
        return f"{only}, and {still}: longer training can change the order." if improving else f"{only}."
    told = _change_of_order(of_lengths)
    return (
        f"{told}; after {last.length:,}, {still}, so that longer training can change it again." if still else f"{told}."
    )


def _change_of_order(of_lengths: list[Ranking]) -> str:
    last, orders = of_lengths[-1], [list(ranking.rows["method"]) for ranking in of_lengths]
    others = [(r, order[0]) for r, order in zip(of_lengths, orders, strict=True) if order[0] != orders[-1][0]]
    if others:
        shown = ", ".join(f"{first} after {r.length:,} ({r.rows.iloc[0]['recall@1']:.1f} %)" for r, first in others)
        return f"The order depends on the training length: the highest mean was that of {shown}"
    lengths = " and ".join(f"{ranking.length:,}" for ranking in of_lengths[:-1])
    common = [[method for method in order if method in orders[-1]] for order in orders]
    if all(order == [m for m in orders[-1] if m in order] for order in common):
        return f"The order of the losses is the same after {lengths} iterations"
    first = last.rows.iloc[0]["method"]
    return f"{first} also has the highest mean after {lengths} iterations; the order of the others changes"


def claims_sentence(results: pd.DataFrame, board: pd.DataFrame) -> str:
    """How many verdicts on the claims there are of each kind, and what they rest on.

    Args:
        results: the table of `hloss.study.results.read_results`.
        board: the table of `hloss.study.claims.judge`.
    """
    judged = groups(board)
    if not judged:
        return "No claim of the paper can be judged: the runs that a claim needs are missing."
    counts = verdict_counts(board)
    kinds = ", ".join(f"{n} {_kind(name, n)}" for name, n in counts.items() if n)
    claims = len({rows.iloc[-1]["claim"] for rows in judged})
    verdicts = (
        f"{len(judged)} verdict{'s' * (len(judged) > 1)} on {claims} claim{'s' * (claims > 1)} of the paper: {kinds}"
    )
    return f"{verdicts}. They rest on {_rests_on(results, board)}."


def _kind(name: str, n: int) -> str:
    return name if not name.startswith("depends") else f"{'depends' if n == 1 else 'depend'} on the training length"


def _rests_on(results: pd.DataFrame, board: pd.DataFrame) -> str:
    """Data, seeds and runs that are still improving."""
    judged = board[board["verdict"] != NOT_RUN]
    data = data_words(results)
    asked = judged.loc[judged["dataset"] != "any", "asked"]
    if len(asked) and (asked == "other data").all():
        data += ", which the paper did not use" if results["dataset"].nunique() == 1 else ", none of them of the paper"
    used = {run_id for ids in judged["run_ids"] for run_id in str(ids).split(", ")}
    runs = distinct_runs(results[results["complete"] & results["run_id"].isin(used) & (results["length"] > 0)])
    trained = results[results["complete"] & (results["length"] > 0)]
    seeds = trained.groupby(["dataset", "comparison", "method"])["seed"].nunique().max() if len(trained) else 0
    improving = int(runs["still_improving"].sum())
    parts = [data, f"at most {few(int(seeds))} per method"]
    parts += [f"runs of which {improving} of {len(runs)} are still improving"] if improving else []
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _missing_sentence(results: pd.DataFrame) -> list[str]:
    missing = results[~results["complete"]].drop_duplicates(["comparison", "method", "seed", "dataset"])
    if missing.empty:
        return []
    return [
        f"This study is not complete: {len(missing)} runs of its comparisons are missing, and can change the answer."
    ]


def few(n: int) -> str:
    """A number of seeds in words, as in "five seeds".

    Args:
        n: the number.
    """
    return "one seed" if n == 1 else f"{_word(n)} seeds"


def _word(n: int) -> str:
    return NUMBERS[n] if n < len(NUMBERS) else f"{n:,}"
