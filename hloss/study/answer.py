"""The answer of a study in a few sentences, made from its results.

The sentences name the loss with the highest mean, its lead over the next loss and the effect of the training length.
They also give the number of verdicts of each kind, and the limits of the results.
"""

import math
from typing import NamedTuple

import pandas as pd

from hloss.study.board import compared, counted, groups, outcome
from hloss.study.claims import DEPENDS, conclusions
from hloss.study.criteria import NOT_RUN, OPEN, REPRODUCED
from hloss.study.difficulty import in_words
from hloss.study.estimates import Estimate, paired_difference
from hloss.study.results import distinct_runs, lengths_in
from hloss.study.spec import LOSS_COMPARISONS
from hloss.study.statistics import shown_interval
from hloss.study.tables import listed, signed

DATA = {"glyphs": "drawn characters", "cub": "birds", "sop": "products", "cuhk03": "persons", "market1501": "persons"}
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
        absent: losses of this comparison without a complete run.
    """

    dataset: str
    comparison: str
    length: int
    rows: pd.DataFrame
    runs: pd.DataFrame
    absent: list[str]

    def of(self, method: str) -> pd.DataFrame:
        """The runs of a method.

        Args:
            method: a method of `rows`.
        """
        return self.runs[self.runs["method"] == method]

    def difference(self, a: str, b: str) -> Estimate:
        """Recall@1 of one method minus that of another, in points.

        Args:
            a: a method of `rows`.
            b: the method that is subtracted.
        """
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
    planned = results[named & (results["length"] > 0)]
    absent = list(planned.loc[~planned["method"].isin(runs["method"]), "method"].unique())
    rows = table[(table["dataset"] == dataset) & (table["comparison"] == comparison) & (table["n"] > 0)]
    return [
        Ranking(
            dataset,
            comparison,
            length,
            rows[rows["length"] == length].sort_values("recall@1", ascending=False, kind="stable"),
            runs[runs["length"] == length],
            absent,
        )
        for length in lengths_in(runs)
    ]


def data_words(results: pd.DataFrame) -> str:
    """The datasets in words, as in "one dataset of drawn characters (glyphs)".

    Args:
        results: a table with the column dataset.
    """
    names = list(results["dataset"].unique())
    if len(names) == 1:
        return f"one dataset{f' of {DATA[names[0]]}' if names[0] in DATA else ''} ({names[0]})"
    return f"{_word(len(names))} datasets ({', '.join(names)})"


def _titled(dataset: str) -> str:
    """A dataset with its content in words, as in "cub (birds)"."""
    return f"{dataset} ({DATA[dataset]})" if dataset in DATA else dataset


class Answer(NamedTuple):
    """A part of the answer.

    Attributes:
        short: the answer in a few words; "" if an earlier part has them.
        text: the numbers behind it, and their limits; "" if a later part has them.
    """

    short: str
    text: str

    def __str__(self) -> str:
        return f"{self.short} {self.text}".strip()


def answers(results: pd.DataFrame, table: pd.DataFrame, board: pd.DataFrame) -> list[Answer]:
    """The answer of a study.

    Args:
        results: the table of `hloss.study.results.read_results`.
        table: its `hloss.study.statistics.summary`.
        board: the table of `hloss.study.claims.judge`.
    """
    told, found = [], [rankings(results, table, dataset) for dataset in results["dataset"].unique()]
    ranked = [of_lengths for of_lengths in found if of_lengths]
    for of_lengths in ranked:
        leader, change = leader_answer(of_lengths[-1]), length_answer(of_lengths)
        if len(ranked) == 1:
            told = [leader, change]
        else:
            short = f"{_titled(of_lengths[-1].dataset)}: {leader.short} {change.short}"
            told.append(Answer(short, f"{leader.text} {change.text}"))
    told = told or [Answer(*words) for words in in_words(results)]
    told = told or [Answer("There is no answer yet.", "No loss has a complete trained run.")]
    limits = [Answer(part.short, "Section 1 says why.") for part in reach_of_counts(board)]
    told = [*told, claims_answer(results, board), *limits]
    if len(ranked) > 1:  # the texts fill a screen
        told = [Answer(part.short, "") for part in told] + [Answer("", part.text) for part in told]
    return [*_missing_answer(results), *told]


def leader_answer(ranking: Ranking) -> Answer:
    """The leading loss after the longest length, its lead, and the rank of the histogram loss.

    Args:
        ranking: the order of the losses after this length.
    """
    first = ranking.rows.iloc[0]
    setting = "tuned settings" if ranking.comparison == TUNED else "one fixed setting"
    least, most = int(ranking.rows["n"].min()), int(ranking.rows["n"].max())
    seeds = few(most) if most == least else f"{_word(least)} to {few(most)}"
    seeds = f"mean of {seeds}" if most > 1 else seeds
    where = f"After {ranking.length:,} iterations on {ranking.dataset} ({setting}, {seeds})"
    recall = f"{first['recall@1']:.1f} %{_interval_of(first)}"
    if len(ranking.rows) == 1:
        return Answer(f"Only {first['method']} was measured.", f"{where} it has a test Recall@1 of {recall}.")
    lead = ranking.difference(first["method"], ranking.rows.iloc[1]["method"])
    low, _ = lead.interval()
    place, difference = _histogram_place(ranking)
    short = f"{first['method']} leads by {signed(lead.mean)} points" if low > 0 else "no loss clearly leads"
    told = f"{where} {first['method']} has the highest test Recall@1, {recall}{_lead_in_words(ranking, lead)}."
    so_far = "So far, " * bool((ranking.rows["n"] < ranking.rows["of"]).any())
    short = f"{so_far}{short}" if so_far else short[0].upper() + short[1:]
    return Answer(f"{short}{place}.", told + difference)


def _lead_in_words(ranking: Ranking, lead: Estimate) -> str:
    """The difference between the first loss and the next; its seeds, if not all have both; whether it can be chance."""
    first, second = ranking.rows.iloc[0], ranking.rows.iloc[1]
    next_one = f"the next, {second['method']}{_doubt(lead)}"
    if lead.n == first["n"] == second["n"]:
        return f", {_distance(lead.mean)} above {next_one}"
    side = "below" if lead.mean < 0 else "above"
    return f". On the {few(lead.n)} that both have, it is {_distance(lead.mean)} {side} {next_one}"


def _doubt(difference: Estimate) -> str:
    """The interval of a difference, and whether the difference can be chance."""
    low, high = difference.interval()
    shown = "" if math.isnan(low) else f" (95 % CI {signed(low, plus=True)} to {signed(high, plus=True)})"
    return f"{shown}{', which can be chance' * (not (low > 0 or high < 0))}"


def _distance(points: float) -> str:
    """A difference in words, without its sign."""
    return f"{'less than 0.1' if abs(points) < 0.05 else signed(abs(points))} points"


def _interval_of(row: pd.Series) -> str:
    known = pd.notna(row["recall@1 low"])
    return f" (95 % CI {shown_interval(row['recall@1 low'], row['recall@1 high'])})" if known else ""


def _histogram_place(ranking: Ranking) -> tuple[str, str]:
    """Rank of the best histogram loss, and its difference from the first; empty for the first two losses.

    The rank is a range if the interval of the difference from a loss above or below includes 0.
    """
    losses = ranking.runs.drop_duplicates("method").set_index("method")["loss"]
    methods = list(ranking.rows["method"])
    place = next((i for i, method in enumerate(methods) if losses[method] == "histogram"), 0)
    if place < 2:
        return "", ""
    gaps = {method: ranking.difference(methods[place], method) for method in methods if method != methods[place]}
    close = [method for method, gap in gaps.items() if gap.interval()[0] <= 0 <= gap.interval()[1]]
    best = 1 + sum(method not in close for method in methods[:place])
    worst = len(methods) - sum(method not in close for method in methods[place + 1 :])
    number = f"{best} to {worst}" if worst > best else str(best)
    points = f"{signed(gaps[methods[0]].mean, plus=True)} points{_doubt(gaps[methods[0]])}"
    chance = f" The difference from {listed(close)} can be chance." * bool(close)
    return (
        f"; the histogram loss is number {number} of {len(methods)}",
        f" The difference of the histogram loss from the first is {points}.{chance}",
    )


def length_answer(of_lengths: list[Ranking]) -> Answer:
    """Whether the order of the losses changes with the length, and how many runs are still improving.

    Args:
        of_lengths: the order after each length, the shortest first.
    """
    last = of_lengths[-1]
    runs = last.runs.drop_duplicates("run_id")
    improving = int(runs["still_improving"].sum())
    still = f"After {last.length:,} iterations {improving} of the {len(runs)} runs of these losses are still improving"
    if len(of_lengths) > 1:
        short, told = _change_of_order(of_lengths)
        return Answer(short, told + (f" {still}, so longer training can still change the order." if improving else ""))
    if improving:
        return Answer("Longer training can change the order.", f"{still}, and no other length was measured.")
    return Answer("One training length was measured.", "No run is still improving at its end.")


def _change_of_order(of_lengths: list[Ranking]) -> tuple[str, str]:
    last, orders = of_lengths[-1], [list(ranking.rows["method"]) for ranking in of_lengths]
    lengths_of: dict[str, list[str]] = {}  # of the losses that are first at a shorter length, but not at the last
    for ranking, (first, *_) in zip(of_lengths, orders, strict=True):
        if first != orders[-1][0]:
            mean = ranking.rows.iloc[0]["recall@1"]
            lengths_of.setdefault(first, []).append(f"{ranking.length:,} ({mean:.1f} %)")
    if lengths_of:
        shown = ", ".join(f"{first} after {listed(lengths)}" for first, lengths in lengths_of.items())
        return "The order depends on the training length.", f"At shorter lengths the highest mean is that of {shown}."
    lengths = listed([f"{ranking.length:,}" for ranking in of_lengths[:-1]])
    if all([m for m in order if m in orders[-1]] == [m for m in orders[-1] if m in order] for order in orders):
        return "The order is the same at every length.", f"The losses have this order after {lengths} iterations, too."
    first = last.rows.iloc[0]["method"]
    return (
        "The same loss has the highest mean at every length.",
        f"{first[0].upper()}{first[1:]} has the highest mean after {lengths} iterations, too; others change places.",
    )


def claims_answer(results: pd.DataFrame, board: pd.DataFrame) -> Answer:
    """The number of verdicts of each kind at the longest length, and the data, seeds and runs behind them.

    Args:
        results: the table of `hloss.study.results.read_results`.
        board: the table of `hloss.study.claims.judge`.
    """
    judged = groups(board)
    if not judged:
        return Answer("No claim of the paper can be judged.", "The runs that a claim needs are missing.")
    last = _last_verdicts(judged)
    claims = last["claim"].nunique()
    of = f"{claims} claims" if claims > 1 else "one claim"
    several = f"{len(last)} verdicts on {of}" if len(last) > 1 else "One verdict on a claim"
    own = last.loc[(last["asked"] == "no data") & (last["dataset"] != "any"), "claim"].nunique()
    of_paper = " of the paper" if not own else f" ({own} not of the paper)"
    longest = " at the longest length" * any(len(rows) > 1 for rows in judged)
    others = len(conclusions(board)) - len(judged)
    told = [
        _broadest_claim(last),
        _reproduced_comparisons(last),
        _change_of_verdicts(judged),
        f"The verdicts rest on {_rests_on(results, board)}.",
    ]
    if others:
        where = "are not part of this study" if results["complete"].all() else "are missing or not part of this study"
        told += [f"{others} other verdict{'s need' if others > 1 else ' needs'} runs that {where}."]
    short = f"{several}{of_paper}{longest}: {counted_verdicts(board)}."
    return Answer(short, " ".join(filter(None, told)))


def _last_verdicts(judged: list[pd.DataFrame]) -> pd.DataFrame:
    """The row of the longest length of each entry of `groups`."""
    return pd.DataFrame([rows.iloc[-1] for rows in judged])


def counted_verdicts(board: pd.DataFrame) -> str:
    """Numbers of verdicts at the longest length, before and after Holm's correction.

    Args:
        board: the table of `hloss.study.claims.judge`, with a claim that was judged.
    """
    last = _last_verdicts(groups(board))
    found, corrected = counted(last["verdict"]), counted(last["holm"])
    same = "the same" if corrected == found else corrected
    return f"{found}; with Holm's correction for the number of tests: {same}" if _by_test(last) else found


def reach_of_counts(board: pd.DataFrame) -> list[Answer]:
    """What limits the counts of verdicts: common comparisons, claims on other data, training classes in common.

    Args:
        board: the table of `hloss.study.claims.judge`.

    Returns:
        One part of the answer; none if nothing limits the counts.
    """
    judged = groups(board)
    if not judged:
        return []
    last = _last_verdicts(judged)
    told = [_common_comparisons(last), _without_test(last), _after_holm(last)]
    short = "The counts of verdicts have limits."
    if (last.loc[last["dataset"] != "any", "asked"] == "other data").sum() > 1:
        short = "The counts do not measure how reliable the paper is."
        told += ["Claims of the paper about different datasets can contradict each other on one dataset."]
    if (last["shared training"] != "").any():
        corrected = last["shared training"].where(last["shared training"] != "", last["verdict"])
        told += [
            "The seeds share training classes; with intervals that are corrected for this, without Holm's correction, "
            f"the counts are {counted(corrected)}."
        ]
    text = " ".join(filter(None, told))
    return [Answer(short, text)] if text else []


def _common_comparisons(last: pd.DataFrame) -> str:
    """The number of comparisons that decide the verdicts, and the one that decides most; "" if each has its own."""
    same = last["difference"].abs().round(9)  # equal if two claims state one comparison in opposite directions
    sizes = same.groupby([last["dataset"], last["unit"], same]).transform("size").fillna(1)
    if not len(sizes) or sizes.max() < 2:
        return ""
    number = round((1 / sizes).sum())
    most = compared(last.loc[sizes.idxmax()])
    several = f"{number} different comparisons; one ({most}) decides {sizes.max():.0f} of them"
    return f"The {len(last)} verdicts rest on {several if number > 1 else f'one comparison ({most})'}."


def _by_test(last: pd.DataFrame) -> bool:
    """Whether a statistical test decides a verdict."""
    return bool(((last["verdict"] != OPEN) & (last["p holds"] >= 0)).any())


def _without_test(last: pd.DataFrame) -> str:
    """The number of verdicts that no statistical test decides; "" if there are none."""
    if not _by_test(last):
        return "No verdict is decided by a statistical test."
    untested = int(((last["verdict"] != OPEN) & ~(last["p holds"] >= 0)).sum())
    several = f"{untested} of the verdicts rest{'s' * (untested == 1)} on no statistical test"
    return f"{several}; Holm's correction does not change {'it' if untested == 1 else 'them'}." if untested else ""


def _after_holm(last: pd.DataFrame) -> str:
    """The comparisons that decide the tested verdicts after Holm's correction; "" if it leaves none or all."""
    decided = last[(last["holm"] != OPEN) & (last["p holds"] >= 0)]
    if not len(decided) or (last["holm"] == last["verdict"]).all():
        return ""
    told = []
    for verdict, rows in decided.groupby("holm", sort=False):
        pairs = [compared(row) for _, row in rows.iterrows()]
        named = [f"{pair} ({pairs.count(pair)})" if pairs.count(pair) > 1 else pair for pair in dict.fromkeys(pairs)]
        told.append(f"{verdict.capitalize()}: {'; '.join(named)}.")
    return f"After this correction these comparisons decide the others. {' '.join(told)}"


def _broadest_claim(last: pd.DataFrame) -> str:
    """The verdict on the claim that compares the histogram loss with the most others; "" if all have one rival."""
    of_losses = last[last["comparison"].isin(LOSS_COMPARISONS) & last["decisive"].str.startswith("histogram")]
    of_losses = of_losses.sort_values("comparison", key=lambda names: names != TUNED, kind="stable")
    parts = of_losses["parts"].map(len)
    if not len(parts) or parts.max() < 2:
        return ""
    row = of_losses.loc[parts.idxmax()]
    claim = row["text"].removesuffix(".")
    return f'"{claim}": {row["verdict"]}.'


def _reproduced_comparisons(last: pd.DataFrame) -> str:
    """How many reproduced verdicts compare the histogram loss with another loss; "" for fewer than two."""
    found = last[last["verdict"] == REPRODUCED]
    if len(found) < 2:
        return ""
    of_losses = found.loc[found["comparison"].isin(LOSS_COMPARISONS), "decisive"].str
    number = (of_losses.contains("histogram minus ") | of_losses.contains(" minus histogram")).sum()
    of = f"of the {len(found)} reproduced verdicts"
    return f"{number or 'None'} {of} compare{'s' * bool(number < 2)} the histogram loss with another loss."


def _change_of_verdicts(judged: list[pd.DataFrame]) -> str:
    """The number of verdicts that depend on the length, and how many were "reproduced" at a shorter length only."""
    changed = [rows for rows in judged if outcome(rows) == DEPENDS]
    if not changed:
        return ""
    if len(judged) == 1:
        return "It has another verdict at a shorter length."
    lost = sum((rows["verdict"] == REPRODUCED).any() and rows["verdict"].iloc[-1] != REPRODUCED for rows in changed)
    only = f"; {lost} {'were' if lost > 1 else 'was'} reproduced earlier in training only" if lost else ""
    differ = f"differ{'s' * (len(changed) == 1)} at a shorter length"
    return f"{len(changed)} of the {len(judged)} verdicts {differ}{only}."


def _rests_on(results: pd.DataFrame, board: pd.DataFrame) -> str:
    """Data, seeds and runs that are still improving."""
    judged = board[board["verdict"] != NOT_RUN]
    of_claims = results[results["dataset"].isin(judged["dataset"])]
    data = data_words(of_claims if len(of_claims) else results)
    asked = judged.loc[judged["dataset"] != "any", "asked"]
    if len(asked) and (asked == "other data").all():
        data += ", not data of the paper"
    elif (asked == "other data").any():
        data = f"{data.removesuffix(')')}; some claims name other data)"
    used = {run_id for ids in judged["run_ids"] for run_id in str(ids).split(", ")}
    trained = results[results["complete"] & (results["length"] > 0)]
    runs = distinct_runs(trained[trained["run_id"].isin(used)])
    parts = [data, f"at most {few(most_seeds(trained))} per method"]
    improving = int(runs["still_improving"].sum())
    if improving:
        of = f"{len(runs)} of the {len(distinct_runs(trained))} trained runs"
        parts += [f"{of}; {improving} of these {len(runs)} are still improving"]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def most_seeds(trained: pd.DataFrame) -> int:
    """The largest number of seeds of a method.

    Args:
        trained: complete runs with training, from `hloss.study.results.read_results`.
    """
    return int(trained.groupby(["dataset", "comparison", "method"])["seed"].nunique().max()) if len(trained) else 0


def _missing_answer(results: pd.DataFrame) -> list[Answer]:
    missing = results[~results["complete"]].drop_duplicates(["dataset", "comparison", "method", "seed"])
    if missing.empty:
        return []
    told = f"{len(missing)} runs of its comparisons are missing and can change the answer."
    fixed = {d for d in results["dataset"].unique() if best_comparison(results, d) == LOSS_COMPARISONS[0]}
    if (missing["dataset"].isin(fixed) & (missing["comparison"] == TUNED)).any():
        told += " Runs of the tuned losses are among them, so the answer is that at one fixed setting."
    return [Answer("This study is not complete.", told)]


def few(n: int) -> str:
    """A number of seeds in words, as in "five seeds".

    Args:
        n: the number.
    """
    return "one seed" if n == 1 else f"{_word(n)} seeds"


def _word(n: int) -> str:
    return NUMBERS[n] if n < len(NUMBERS) else f"{n:,}"
