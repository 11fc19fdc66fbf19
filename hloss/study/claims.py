"""Verdicts on the paper's claims, computed from the results of a study.

`reports/claims.yaml` lists the claims. `judge` gives one verdict per claim, dataset, comparison and training length. A
verdict combines parts, one per pair of methods or of levels of a setting (`hloss.study.criteria`):

- "reproduced": every part holds.
- "not reproduced": at least one part is refuted.
- "inconclusive": neither of the two.
- "not run": a run that the claim needs is missing.

Each verdict is given a second time with p values adjusted by Holm's method for all verdicts of a dataset at a length.
"""

import math
from collections.abc import Iterator
from math import comb
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hloss.integrations.pml_losses import PREFIX
from hloss.names import did_you_mean
from hloss.runs.config import LOSSES, NO_LOSS, RunConfig
from hloss.runs.errors import ConfigError
from hloss.runs.files import project_path
from hloss.study.criteria import (
    LEVEL_CRITERIA,
    METHOD_CRITERIA,
    NOT_RUN,
    OPEN,
    REFUTED,
    REPRODUCED,
    Part,
    decisive_part,
    equivalent,
    needed,
    p_values,
    verdict,
)
from hloss.study.estimates import (
    Estimate,
    corrected_for_shared_training,
    holm,
    mean_over_runs,
    paired_difference,
)
from hloss.study.input_files import checked, read_yaml, shown
from hloss.study.published import EXACT, compare_with_published
from hloss.study.results import at_length, grid_size, lengths_in, recall_names
from hloss.study.spec import CHOICE, DIFFICULTY, INITIAL, short_value
from hloss.study.statistics import EQUIVALENCE_MARGIN

CLAIMS = "reports/claims.yaml"
SPLITS = 5  # splits of CUHK03; a published value is the mean over them
BUDGET = 0.25  # share of a grid's settings, for the check "budget"
OVERLAP = "overlap"
DEPENDS = "depends on the length"
LARGEST_EXPONENT = 2.5  # of a quadratic cost, for the check "quadratic"
REQUIRED = {  # check -> the settings that a claim with it needs; other checks compare methods or levels
    "above_value": ("comparison", "method", "values"),
    "budget": ("comparison", "method", "rivals"),
    "quadratic": (),
    "table": ("comparison",),
}
NO_NUMBERS = Part("", Estimate(math.nan, math.nan, 0), 1.0, 1.0, is_tested=False, unit="").numbers()


class Claim(BaseModel):
    """An entry of `reports/claims.yaml`.

    Attributes:
        name: short name, unique in the file.
        section: section, figure or table of the paper.
        claim: the claim as one sentence.
        criterion: the condition for the verdict "reproduced".
        check: the criterion to apply; a key of `METHOD_CRITERIA` or `LEVEL_CRITERIA`, "above_value", "budget",
            "quadratic" or "table".
        margin: largest negligible difference, in points of Recall@K.
        data: datasets for which the paper makes the claim.
        comparison: comparisons of a study that are judged, with one verdict each.
        equal: "iterations": runs of the same length are compared; "images": runs that saw the same number of images.
        among: settings of the runs to use; a list allows several values, None stands for "not set".
        axis: the setting whose levels are compared.
        levels: levels that must be present; None: the levels that are found.
        reference: the level with which the others are compared.
        within: a setting; levels are compared separately for each of its values.
        every_k: compare Recall@K at every K, not at 1 only.
        method: settings of the method that the claim is about.
        rivals: settings of each method that it is compared with.
        values: published Recall@1 by dataset, in %, with which the method is compared.
        published: published values, shown with the evidence on the datasets in `data`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    section: str
    claim: str
    criterion: str
    check: Literal[
        "above", "equivalent", "not_below", "less_overlap", "no_gain", "best", "near_best", "sensitive",
        "above_value", "budget", "quadratic", "table",
    ]  # fmt: skip
    margin: float = Field(EQUIVALENCE_MARGIN, ge=0)
    data: list[str]
    comparison: list[str] = []
    equal: Literal["iterations", "images"] = "iterations"
    among: dict[str, Any] = {}
    axis: str | None = None
    levels: list[Any] | None = None
    reference: Any = None
    within: str | None = None
    every_k: bool = False
    method: dict[str, Any] | None = None
    rivals: list[dict[str, Any]] | None = None
    values: dict[str, float] = {}
    published: str = ""

    @model_validator(mode="after")
    def _check_methods(self) -> "Claim":
        if bool(self.method) != bool(self.rivals or self.values):
            raise ValueError("method and rivals (or values) are only allowed together; add the missing one")
        return self

    @model_validator(mode="after")
    def _check_settings(self) -> "Claim":
        known = tuple(RunConfig.model_fields)
        axes = [name for name in (self.axis, self.within) if name]
        for name in (*axes, *self.among, *(self.method or {}), *(n for rival in self.rivals or () for n in rival)):
            if name not in known:
                raise ValueError(f"{name} is not a setting of a run{did_you_mean(name, known)}")
        return self

    @model_validator(mode="after")
    def _check_losses(self) -> "Claim":
        known = (*LOSSES, NO_LOSS)
        for settings in (self.among, self.method or {}, *(self.rivals or ())):
            named = settings.get("loss", [])
            for loss in named if isinstance(named, list) else [named]:
                if loss not in known and not str(loss).startswith(PREFIX):
                    allowed = ", ".join((*known, f"{PREFIX}NAME"))
                    raise ValueError(f"loss {loss!r} is unknown; allowed are {allowed}{did_you_mean(str(loss), known)}")
        return self

    @model_validator(mode="after")
    def _check_required(self) -> "Claim":
        criteria = METHOD_CRITERIA if self.method else LEVEL_CRITERIA
        if self.check not in (*REQUIRED, *criteria):
            place = f"{'with' if self.method else 'without'} method"
            raise ValueError(f"check {self.check!r} does not fit a claim {place}; allowed are {', '.join(criteria)}")
        compared = ("rivals",) if self.method else ("axis",) if self.check == "sensitive" else ("axis", "reference")
        required = REQUIRED.get(self.check, ("comparison", *compared))
        missing = [name for name in required if getattr(self, name) in (None, [], {}, "")]
        if missing:
            raise ValueError(f"check {self.check!r} needs {' and '.join(missing)}; add the missing setting")
        return self


class _MissingRuns(Exception):
    """Runs that a claim needs are missing; the message names them."""


def read_claims(file: str = CLAIMS) -> list[Claim]:
    """Read the claims.

    Args:
        file: path from the project's root or from the current folder.

    Returns:
        The claims in the order of the file.

    Raises:
        ConfigError: if an entry is invalid; the message names the entry, the setting, its value and what is allowed.
    """
    path = project_path(file)
    rows = read_yaml(path)
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: got {shown(rows)[:80]}; must be a list of claims, which begin with `- name:`")
    claims: dict[str, Claim] = {}
    for number, row in enumerate(rows, start=1):
        name = row.get("name", number) if isinstance(row, dict) else number
        claim = checked(Claim, row, f"{path}, claim {shown(name)}")
        if claim.name in claims:
            raise ConfigError(f"{path}, claim {shown(name)}: name: occurs twice; give each claim its own name")
        claims[claim.name] = claim
    return list(claims.values())


def judge(results: pd.DataFrame, cost: pd.DataFrame | None = None, claims: list[Claim] | None = None) -> pd.DataFrame:
    """Judge claims by the results of a study.

    Args:
        results: the table of `hloss.study.results.read_results`.
        cost: seconds of the loss by batch size (columns batch_size, seconds), for the claim on its cost; None: not
            measured.
        claims: the claims to judge; None: all of `reports/claims.yaml`.

    Returns:
        One row per claim, dataset, comparison and length; a dataset with only the comparison `DIFFICULTY` has no rows.
        The claim on the cost has one row with the dataset "any". Columns:

        - claim, text, section, criterion, dataset, asked ("the paper's data", "other data" or, for the cost, "no
          data"), comparison, length (as text; empty if there is none);
        - conclusion: the verdicts at all lengths, the same in all rows of a comparison;
        - verdict; holm: the verdict with adjusted p values;
        - initial grid: the verdict with the settings that the grids chose before they were extended; "not run" without
          runs, empty if no grid was extended;
        - shared training: the verdict with intervals that are corrected for the training classes that the seeds share
          (`hloss.study.estimates.corrected_for_shared_training`); empty if no seed has test classes of its own;
        - grids: number of runs in the grid of each method, as in "triplet 20 + 4": 20 runs and 4 of extensions;
        - still improving: number of used runs that are still improving, as in "3 of 10 runs"; empty for none;
        - parts: every part, a list of texts; evidence: the same as one text; decisive: the part that decides the
          verdict; published: published values, if the dataset is the paper's;
        - needed: for "inconclusive", what would decide it by the present estimates (`hloss.study.criteria.needed`);
        - difference, low, high, confidence (of the interval, in %), n, unit, margin: numbers of that part; holds above,
          holds below: bounds of the differences for which it holds, NaN without a bound. For the claim on the cost,
          difference is the exponent;
        - p holds, p refuted: p values, NaN without a test;
        - run_ids: ids of the used runs.

    Raises:
        ConfigError: if `reports/claims.yaml` is invalid.
    """
    rows, judged = [], results[results["comparison"] != DIFFICULTY]
    for claim in read_claims() if claims is None else claims:
        if claim.check == "quadratic":
            rows.append(_row(claim, "any", "", "", _judge_cost(cost)))
            continue
        for dataset, runs in judged.groupby("dataset", sort=False):
            for comparison in claim.comparison:
                rows += _rows_of_comparison(claim, str(dataset), comparison, runs)
    return _with_holm(pd.DataFrame(rows)) if rows else pd.DataFrame()


def read_board(file: Path) -> pd.DataFrame:
    """Read a table that `judge` made, from its CSV file.

    Args:
        file: reports/STUDY/claims.csv.

    Returns:
        The table of `judge` without the column parts; missing text is empty and missing numbers are NaN.
    """
    numbers = [name for name in NO_NUMBERS if name != "unit"] + ["p holds", "p refuted"]
    return pd.read_csv(file, keep_default_na=False, na_values={name: [""] for name in numbers})


def conclusions(board: pd.DataFrame) -> pd.DataFrame:
    """The rows of the longest length of each claim, dataset and comparison.

    Args:
        board: the table of `judge`.

    Returns:
        One row per claim, dataset and comparison; `conclusion` has the verdicts at all lengths.
    """
    return board.groupby(["claim", "dataset", "comparison"], sort=False, dropna=False).tail(1)


def overlap(results: pd.DataFrame) -> pd.Series:
    """Overlap of the densities of positive and negative cosine similarities of test images, sum of min(h+, h-).

    Args:
        results: runs with the columns positive_after and negative_after (mass per node, each sums to 1).

    Returns:
        The overlap of each run in % of the mass, with the index of `results`.
    """
    pairs = zip(results["positive_after"], results["negative_after"], strict=True)
    return pd.Series([100 * np.minimum(p, n).sum() for p, n in pairs], index=results.index)


class _Judgement(NamedTuple):
    """The columns of a verdict's row that follow from the results."""

    verdict: str
    parts: list[str]
    decisive: str
    numbers: dict[str, Any]
    needed: str = ""
    improving: str = ""
    p_holds: float = math.nan
    p_refuted: float = math.nan
    run_ids: str = ""


def _row(claim: Claim, dataset: str, comparison: str, length: str, found: _Judgement) -> dict[str, Any]:
    """A row of the board, with the raw verdict for the columns that depend on other rows."""
    return {
        "claim": claim.name,
        "text": claim.claim,
        "section": claim.section,
        "criterion": claim.criterion,
        "dataset": dataset,
        "asked": "the paper's data" if dataset in claim.data else "other data" if claim.data else "no data",
        "comparison": comparison,
        "length": length,
        "conclusion": found.verdict,
        "verdict": found.verdict,
        "holm": found.verdict,
        "initial grid": "",
        "shared training": "",
        "grids": "",
        "still improving": found.improving,
        "parts": found.parts,
        "evidence": "; ".join(found.parts),
        "decisive": found.decisive,
        "published": claim.published * (dataset in claim.data),
        "needed": found.needed,
        **found.numbers,
        "p holds": found.p_holds,
        "p refuted": found.p_refuted,
        "run_ids": found.run_ids,
    }


def _rows_of_comparison(claim: Claim, dataset: str, comparison: str, runs: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per length of a comparison."""
    initial = _judged_at_lengths(claim, comparison, _initial_grids(comparison, runs))
    before = {length: found.verdict for length, found in initial}
    has_own_classes = "split" in runs and runs.loc[runs["comparison"] == comparison, "split"].nunique() > 1
    with corrected_for_shared_training():
        corrected = dict(_judged_at_lengths(claim, comparison, runs)) if has_own_classes else {}
    rows = []
    for length, found in _judged_at_lengths(claim, comparison, runs):
        more = {
            "initial grid": before.get(length, ""),
            "shared training": corrected[length].verdict if length in corrected else "",
            "grids": _grid_sizes(comparison, runs, found.run_ids),
        }
        rows.append(_row(claim, dataset, comparison, length, found) | more)
    told = _conclusion([row for row in rows if row["verdict"] != NOT_RUN])
    return [row | {"conclusion": told} for row in rows]


def _grid_sizes(comparison: str, runs: pd.DataFrame, run_ids: str) -> str:
    """Number of runs with which each method of these runs was tuned; empty if the comparison is not tuned."""
    used = runs[(runs["comparison"] == comparison) & runs["run_id"].isin(run_ids.split(", "))]
    distinct = runs.drop_duplicates(["comparison", "method", "run_id"])
    sizes = {method: grid_size(distinct, comparison, method) for method in used["method"].unique()}
    return ", ".join(f"{method} {size}" for method, size in sizes.items() if size != "0")


def _initial_grids(comparison: str, runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with the settings that were chosen before grids were extended; empty if no grid of the comparison was."""
    initial = runs[runs["comparison"] == comparison + INITIAL].assign(comparison=comparison)
    kept = runs[(runs["comparison"] == comparison) & ~runs["method"].isin(initial["method"])]
    return pd.concat([initial, kept]) if len(initial) else initial


def _conclusion(rows: list[dict[str, Any]]) -> str:
    """The verdicts at all lengths; the text begins with `DEPENDS` if they differ."""
    if not rows:
        return NOT_RUN
    verdicts = list(dict.fromkeys(row["verdict"] for row in rows))
    improving = [" (still improving)" * bool(row["still improving"]) for row in rows]
    if len(rows) == 1:
        return str(verdicts[0]) + improving[0]
    named = [f"{row['verdict']} after" if len(verdicts) > 1 else "after" for row in rows]
    shown = [f"{name} {row['length']}{still}" for name, row, still in zip(named, rows, improving, strict=True)]
    return f"{DEPENDS if len(verdicts) > 1 else verdicts[0]}: {', '.join(shown)}"


def _with_holm(board: pd.DataFrame) -> pd.DataFrame:
    """Fill the column holm.

    A family is all tested verdicts of a dataset at lengths of the same rank, counted from the longest of a claim.
    """
    place = board[::-1].groupby(["claim", "dataset", "comparison"]).cumcount()  # 0 is the longest
    tested = board[board["p holds"].notna()]
    for _, family in tested.groupby([tested["dataset"], place[tested.index]]):
        adjusted = zip(holm(family["p holds"]), holm(family["p refuted"]), strict=True)
        board.loc[family.index, "holm"] = [verdict(*pair) for pair in adjusted]
    return board


def _judged_at_lengths(claim: Claim, comparison: str, runs: pd.DataFrame) -> Iterator[tuple[str, _Judgement]]:
    """Each length of a comparison, the shortest first, and the judgement by the results after this length."""
    name = comparison + CHOICE if claim.check == "budget" else comparison
    compared = runs[runs["comparison"] == name]
    for length, at in _at_lengths(claim, compared):
        yield length, _judge_runs(claim, at)


def _at_lengths(claim: Claim, runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each length, or of each number of images that every method has seen, the smallest first."""
    if claim.equal == "images" and len(runs):
        images = runs["length"] * runs["batch_size"]
        seen = [set(of_method) for _, of_method in images.groupby(runs["method"])]
        common = sorted(set.intersection(*seen))
        found = [(f"{number:,.0f} images", runs[images == number]) for number in common]
    else:
        found = [(f"{length:,} iterations", at_length(runs, length)) for length in lengths_in(runs)]
    return found or [("", runs)]


def _judge_runs(claim: Claim, runs: pd.DataFrame) -> _Judgement:
    try:
        used, parts = _claim_parts(claim, runs)
    except _MissingRuns as missing:
        return _Judgement(NOT_RUN, [str(missing)], str(missing), NO_NUMBERS)
    p_holds, p_refuted = p_values(parts)
    tested = all(part.is_tested for part in parts)
    decisive = decisive_part(parts)
    return _Judgement(
        verdict(p_holds, p_refuted),
        list(map(str, parts)),
        str(decisive),
        decisive.numbers(),
        needed(parts),
        _still_improving(used),
        *((p_holds, p_refuted) if tested else (math.nan, math.nan)),
        ", ".join(sorted(set(used["run_id"]))),
    )


def _still_improving(runs: pd.DataFrame) -> str:
    """How many of these runs reached their best validation in the last tenth of their length; empty for none."""
    trained = runs.drop_duplicates("run_id")
    trained = trained[trained["length"] > 0]
    n = int(trained["still_improving"].sum())
    return f"{n} of {len(trained)} runs" if n else ""


def _claim_parts(claim: Claim, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Part]]:
    """The runs that a claim needs, and the parts of the claim."""
    if claim.check == "table":
        used = _complete_runs(runs, claim.among)
        return used, _compare_with_table(used)
    if claim.check == "above_value":
        return _compare_with_value(claim, runs)
    if claim.check == "budget":
        return _compare_budgets(claim, runs)
    return (_compare_levels if claim.method is None else _compare_methods)(claim, runs)


def _complete_runs(runs: pd.DataFrame, settings: dict[str, Any]) -> pd.DataFrame:
    """The runs with these settings, which must all be complete. A list allows several values, None means "not set"."""
    for name, value in settings.items():
        allowed = value if isinstance(value, list) else [value]
        column = runs[name] if name in runs else pd.Series(None, index=runs.index, dtype=object)
        runs = runs[column.isin([v for v in allowed if v is not None]) | (column.isna() & (None in allowed))]
    shown = f" ({', '.join(f'{name} {value}' for name, value in settings.items())})" if settings else ""
    if runs.empty:
        raise _MissingRuns(f"this comparison has no such runs{shown}")
    if not runs["complete"].all():
        raise _MissingRuns(f"{(~runs['complete']).sum()} of {len(runs)} runs are missing{shown}")
    return runs


def _runs_of_method(runs: pd.DataFrame, settings: dict[str, Any]) -> pd.DataFrame:
    """The complete runs with these settings, which must belong to one method."""
    runs = _complete_runs(runs, settings)
    methods = runs["method"].unique()
    if len(methods) > 1:
        raise _MissingRuns(f"the settings of one method match several methods: {'; '.join(methods)}")
    return runs


def _columns(claim: Claim, runs: pd.DataFrame) -> list[str]:
    """The compared columns: Recall@1, or Recall@K at every K."""
    return recall_names(runs) if claim.every_k else ["recall@1"]


def _compare_methods(claim: Claim, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Part]]:
    """The runs of the method and of its rivals, and one part per rival and column."""
    assert claim.method is not None
    ours, rivals = _runs_of_method(runs, claim.method), [_runs_of_method(runs, rival) for rival in claim.rivals or []]
    used = pd.concat([ours, *rivals])
    columns, prefix = _columns(claim, used), ""
    if claim.check == "less_overlap":
        columns, prefix, overlaps = [OVERLAP], *_overlaps(used)
        ours, *rivals = (part.assign(overlap=overlaps[part.index]) for part in (ours, *rivals))
    parts = []
    for rival in rivals:
        for column in columns:
            before = f"{column}: " * (len(columns) > 1) + prefix
            label = f"{before}{ours['method'].iloc[0]} minus {rival['method'].iloc[0]}"
            parts.append(METHOD_CRITERIA[claim.check](label, paired_difference(ours, rival, column), claim.margin))
    return used, parts


def _overlaps(runs: pd.DataFrame) -> tuple[str, pd.Series]:
    """Beginning of the labels, and the overlap of each run.

    The overlaps are those in the distance that each loss trains, or of cosine similarities if a run lacks it.
    """
    if "trained_overlap" in runs and runs["trained_overlap"].notna().all():
        return "overlap, ", runs["trained_overlap"]
    return "overlap of cosine similarities, ", overlap(runs)


def _compare_levels(claim: Claim, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Part]]:
    """The runs of the levels of the claim's axis, and the parts of each group of runs (one group without `within`)."""
    assert claim.axis is not None
    runs = _complete_runs(runs, claim.among | ({} if claim.levels is None else {claim.axis: claim.levels}))
    groups = [("", runs)] if claim.within is None else [
        (f"{claim.within} {short_value(value)}: ", group) for value, group in runs.groupby(claim.within)
    ]  # fmt: skip
    parts: list[Part] = []
    columns = _columns(claim, runs)
    for prefix, group in groups:
        levels = dict(list(group.groupby(claim.axis)))
        _check_levels(claim, prefix, levels)
        for column in columns:
            axis = f"{column}: " * (len(columns) > 1) + f"{prefix}{claim.axis}"
            parts += LEVEL_CRITERIA[claim.check](axis, levels, claim.reference, claim.margin, column)
    return runs, parts


def _check_levels(claim: Claim, prefix: str, levels: dict[Any, pd.DataFrame]) -> None:
    found = f"{prefix}{claim.axis} {', '.join(map(short_value, levels))}"
    missing = (set(claim.levels or []) | ({claim.reference} - {None})) - levels.keys()
    if missing:
        raise _MissingRuns(f"{claim.axis} {', '.join(map(short_value, missing))} is missing: got {found}")
    if len(levels) < 2:
        raise _MissingRuns(f"too few levels: got {found}; the check needs 2")
    if not all(runs["seed"].is_unique for runs in levels.values()):
        raise _MissingRuns(f"{found}: a level has several runs of one seed, which differ in other settings")


def _judge_cost(cost: pd.DataFrame | None) -> _Judgement:
    if cost is None or len(cost) < 3:
        missing = "the cost of the loss was not measured with this study"
        return _Judgement(NOT_RUN, [missing], missing, NO_NUMBERS)
    exponent = float(np.polyfit(np.log(cost["batch_size"]), np.log(cost["seconds"]), 1)[0])
    measured = ", ".join(f"{row.batch_size:,.0f}: {1e3 * row.seconds:.0f} ms" for row in cost.itertuples())
    outcome = REPRODUCED if exponent <= LARGEST_EXPONENT else REFUTED if exponent >= 3 else OPEN
    numbers = NO_NUMBERS | {"difference": exponent, "unit": "exponent", "holds below": LARGEST_EXPONENT}
    return _Judgement(outcome, [f"exponent {exponent:.2f} ({measured})"], f"exponent {exponent:.2f}", numbers)


def _compare_with_table(runs: pd.DataFrame) -> list[Part]:
    """One part per value of the paper's Table 1. Values on CUHK03 are means over the same splits as these runs."""
    compared = compare_with_published(runs)
    exact = compared[(compared["match"] == EXACT) & (compared["place"] == "Table 1")]
    if exact.empty:
        raise _MissingRuns("Table 1 has no value for this dataset, network and protocol")
    splits = runs["split"].nunique()
    if splits not in (1, SPLITS):
        raise _MissingRuns(f"the values of Table 1 are means over {SPLITS} splits: got runs of {splits}")
    return [_part_of_table(runs, row, splits > 1) for row in exact.itertuples()]


def _part_of_table(runs: pd.DataFrame, row: Any, same_splits: bool) -> Part:
    """Equivalence with a published value. Means over the same splits are compared without a test."""
    found = mean_over_runs(runs, row.metric)
    difference = found._replace(mean=found.mean - row.published)
    label = f"{row.metric} minus the published {row.published}"
    part = equivalent(label, difference, EQUIVALENCE_MARGIN)
    if not same_splits:
        return part
    # The interval over splits is too wide for means over the same splits. It can refute a value, but not confirm it.
    near = difference.n > 1 and abs(difference.mean) < EQUIVALENCE_MARGIN
    note = " (mean over the same splits, no test)"
    return part._replace(p_holds=float(not near), note=note, is_tested=False)


def _compare_with_value(claim: Claim, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Part]]:
    """The runs of the method, and one part: they are above the published value of their dataset."""
    assert claim.method is not None
    used = _runs_of_method(runs, claim.method)
    dataset = used["dataset"].iloc[0]
    if dataset not in claim.values:
        raise _MissingRuns(f"there is no published value for {dataset}")
    found = mean_over_runs(used)
    difference = found._replace(mean=found.mean - claim.values[dataset])
    label = f"{used['method'].iloc[0]} minus the published {claim.values[dataset]}"
    return used, [METHOD_CRITERIA["above"](label, difference, claim.margin)]


def _compare_budgets(claim: Claim, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Part]]:
    """The runs of the grids, and one part per method: the drop in Recall@1 if only a share of its grid is run.

    The part of the method holds if the drop is below the margin, that of a rival holds if it is not. There is one run
    per setting, so there is no test.
    """
    assert claim.method is not None
    used, parts = [], []
    for settings in (claim.method, *(claim.rivals or [])):
        grid = _complete_runs(runs, settings)
        missed, k = missed_by_budget(grid["validation_recall@1"].to_numpy())
        loss = grid["method"].iloc[0].partition(",")[0]  # the settings follow
        label = f"{loss}, best of {k} random settings minus best of all {len(grid)}, on validation classes"
        holds = (missed < claim.margin) == (settings is claim.method)
        note = " (expected value over draws of the settings, no test)"
        unknown = Estimate(-missed, math.nan, 1)
        bounds = (-claim.margin, math.inf) if settings is claim.method else (-math.inf, -claim.margin)
        limits: dict[str, Any] = {"margin": claim.margin, "holds": bounds, "is_tested": False}
        parts.append(Part(label, unknown, float(not holds), float(holds), note=note, **limits))
        used.append(grid)
    return pd.concat(used), parts


def missed_by_budget(values: np.ndarray, share: float = BUDGET) -> tuple[float, int]:
    """How much the best of a few random settings of a grid is expected to be below the best of all.

    Args:
        values: one value per setting, higher is better.
        share: number of drawn settings, as a share of all.

    Returns:
        The expected difference (Dodge et al. 2019, "Show Your Work", without replacement), and the number of drawn
        settings.
    """
    ordered, k = np.sort(values), max(1, round(share * len(values)))
    chances = np.array([comb(i, k - 1) for i in range(len(values))], dtype=float) / comb(len(values), k)
    return float(ordered[-1] - chances @ ordered), k
