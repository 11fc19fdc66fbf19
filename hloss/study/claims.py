"""Verdicts on the paper's claims, computed from the results of a study.

`reports/claims.yaml` lists the claims. `judge` gives one verdict per claim, dataset and comparison. A verdict combines
parts, one per pair of methods or of levels of a setting:

- "reproduced": every part holds.
- "not reproduced": at least one part is refuted.
- "inconclusive": neither of the two.
- "not run": a run that the claim needs is missing.

One refuted part is enough to refute a claim with k parts, so each part is tested for refutation at 5 % / k
(Bonferroni). That all parts hold needs no correction. "A is above B" is refuted if A is below B, and also if A and B
are equivalent.
"""

from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from hloss.runs.errors import ConfigError
from hloss.runs.files import project_path
from hloss.study.published import EXACT, compare_with_published
from hloss.study.spec import short_value
from hloss.study.statistics import EQUIVALENCE_MARGIN, Difference, equivalence, paired_difference, t_interval

CLAIMS = "reports/claims.yaml"
REPRODUCED, REFUTED, OPEN, NOT_RUN = "reproduced", "not reproduced", "inconclusive", "not run"
LEVEL = 0.05
SPLITS = 5  # splits of CUHK03; a published value is the mean over them


class Claim(BaseModel):
    """An entry of `reports/claims.yaml`.

    Attributes:
        name: short name, unique in the file.
        section: section, figure or table of the paper.
        claim: the claim as one sentence.
        criterion: the condition for the verdict "reproduced".
        check: the test to apply; a key of `METHOD_CHECKS` or `LEVEL_CHECKS`, "quadratic" or "table".
        data: datasets for which the paper makes the claim.
        comparison: comparisons of a study that are judged, with one verdict each.
        among: settings of the runs to use; a list allows several values, None stands for "not set".
        axis: the setting whose levels are compared.
        levels: levels that must be present; None: the levels that are found.
        reference: the level with which the others are compared.
        within: a setting; levels are compared separately for each of its values.
        method: settings of the method that the claim is about.
        rivals: settings of each method that it is compared with.
        published: published values, shown with the evidence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    section: str
    claim: str
    criterion: str
    check: Literal[
        "above", "equivalent", "less_overlap", "rising", "sensitive", "best", "no_gain", "quadratic", "table"
    ]
    data: list[str]
    comparison: list[str] = []
    among: dict[str, Any] = {}
    axis: str | None = None
    levels: list[Any] | None = None
    reference: Any = None
    within: str | None = None
    method: dict[str, Any] | None = None
    rivals: list[dict[str, Any]] | None = None
    published: str = ""

    @model_validator(mode="after")
    def _check_methods(self) -> "Claim":
        if bool(self.method) != bool(self.rivals):
            raise ValueError("method and rivals come together")
        return self


class Part(NamedTuple):
    """Label, difference with its interval, and outcome of one part of a claim.

    Attributes:
        label: the compared pair, as in "histogram minus triplet".
        difference: in points of Recall@1, or in % of the mass for overlaps.
        holds: True: the part holds; False: it is refuted at the corrected level; None: neither.
        confidence: confidence of the interval of `difference`.
        equivalent: whether the part is refuted because the two are equivalent.
    """

    label: str
    difference: Difference
    holds: bool | None
    confidence: float = 1 - LEVEL
    equivalent: bool = False

    def __str__(self) -> str:
        mean, low, high, n = self.difference
        if n < 2:
            return f"{self.label}: {mean:+.1f} (one seed)" if n else f"{self.label}: no common seed"
        interval = f"{100 * self.confidence:.3g} % CI {low:+.1f} to {high:+.1f}, n = {n}"
        return f"{self.label}: {mean:+.1f} ({interval}{', equivalent' * self.equivalent})"


class _MissingRuns(Exception):
    """Runs that a claim needs are missing; the message names them."""


def read_claims(file: str = CLAIMS) -> list[Claim]:
    """Read the claims.

    Args:
        file: path from the project's root or from the current folder.

    Returns:
        The claims in the order of the file.

    Raises:
        ConfigError: if an entry is invalid; the message names the entry and its field.
    """
    path = project_path(file)
    claims = []
    for row in yaml.safe_load(path.read_text()):
        try:
            claims.append(Claim(**row))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"{path}, claim {row.get('name')!r}: {wrong}") from None
    return claims


def judge(results: pd.DataFrame, cost: pd.DataFrame | None = None, claims: list[Claim] | None = None) -> pd.DataFrame:
    """Judge claims by the results of a study.

    Args:
        results: the table of `hloss.study.results.read_results`.
        cost: seconds of the loss by batch size (columns batch_size, seconds), for the claim on its cost; None: not
            measured.
        claims: the claims to judge; None: all of `reports/claims.yaml`.

    Returns:
        One row per claim, dataset and comparison. Columns: claim, text, section, criterion, dataset, asked ("the
        paper's data", "other data" or, for the cost, "no data"), comparison, verdict, evidence (every part), decisive
        (the part that decides the verdict), run_ids (of the runs that were used).

    Raises:
        ConfigError: if `reports/claims.yaml` is invalid.
    """
    rows = []
    for claim in read_claims() if claims is None else claims:
        if claim.check == "quadratic":
            rows.append(_verdict_row(claim, "any", "", _judge_cost(cost)))
            continue
        for dataset, runs in results.groupby("dataset", sort=False):
            for comparison in claim.comparison:
                compared = runs[runs["comparison"] == comparison]
                rows.append(_verdict_row(claim, str(dataset), comparison, _judge_runs(claim, compared)))
    return pd.DataFrame(rows)


def overlap(results: pd.DataFrame) -> pd.Series:
    """Overlap of the densities of positive and negative test similarities, sum of min(h+, h-).

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
    evidence: str
    decisive: str
    run_ids: str = ""


def _verdict_row(claim: Claim, dataset: str, comparison: str, judgement: _Judgement) -> dict[str, str]:
    asked = "the paper's data" if dataset in claim.data else "other data" if claim.data else "no data"
    return {
        "claim": claim.name,
        "text": claim.claim,
        "section": claim.section,
        "criterion": claim.criterion,
        "dataset": dataset,
        "asked": asked,
        "comparison": comparison,
        **judgement._asdict(),
    }


def _judge_runs(claim: Claim, runs: pd.DataFrame) -> _Judgement:
    try:
        used, parts = _claim_parts(claim, runs)
    except _MissingRuns as missing:
        return _Judgement(NOT_RUN, str(missing), str(missing))
    evidence = [*map(str, parts), *([f"published: {claim.published}"] if claim.published else [])]
    decisive = str(_decisive_part(claim.check, parts))
    return _Judgement(_combined_verdict(parts), "; ".join(evidence), decisive, ", ".join(sorted(set(used["run_id"]))))


def _claim_parts(claim: Claim, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Part]]:
    """The runs that a claim needs, and the parts of the claim."""
    if claim.check == "table":
        used = _complete_runs(runs, claim.among)
        return used, _compare_with_table(used)
    return (_compare_levels if claim.method is None else _compare_methods)(claim, runs)


def _decisive_part(check: str, parts: list[Part]) -> Part:
    """The part that decides a verdict: a refuted one, else an open one, else one that holds; the worst of several."""
    worst = WORST.get(check, lambda mean: -abs(mean))
    return min(parts, key=lambda part: ((False, None, True).index(part.holds), worst(part.difference.mean)))


def _combined_verdict(parts: list[Part]) -> str:
    if any(part.holds is False for part in parts):
        return REFUTED
    return REPRODUCED if all(part.holds for part in parts) else OPEN


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


def _values_by_seed(runs: pd.DataFrame, values: pd.Series | None = None) -> pd.Series:
    """The Recall@1 of these runs, or their rows of `values`, indexed by seed."""
    chosen = runs["recall@1"] if values is None else values[runs.index]
    return pd.Series(chosen.to_numpy(), index=runs["seed"].to_numpy())


def _compare_methods(claim: Claim, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Part]]:
    """The runs of the method and of its rivals, and one part per rival."""
    assert claim.method is not None
    ours, rivals = _runs_of_method(runs, claim.method), [_runs_of_method(runs, rival) for rival in claim.rivals or []]
    used = pd.concat([ours, *rivals])
    overlaps = overlap(used) if claim.check == "less_overlap" else None
    prefix = "overlap, " if claim.check == "less_overlap" else ""
    parts = []
    for rival in rivals:
        label = f"{prefix}{ours['method'].iloc[0]} minus {rival['method'].iloc[0]}"
        values = _values_by_seed(ours, overlaps), _values_by_seed(rival, overlaps)
        parts.append(METHOD_CHECKS[claim.check](label, *values, len(rivals)))
    return used, parts


def _compare_levels(claim: Claim, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Part]]:
    """The runs of the levels of the claim's axis, and the parts of each group of runs (one group without `within`)."""
    assert claim.axis is not None
    runs = _complete_runs(runs, claim.among | ({} if claim.levels is None else {claim.axis: claim.levels}))
    groups = [("", runs)] if claim.within is None else [
        (f"{claim.within} {value}: ", group) for value, group in runs.groupby(claim.within)
    ]  # fmt: skip
    parts: list[Part] = []
    for prefix, group in groups:
        levels = {level: _values_by_seed(rows) for level, rows in group.groupby(claim.axis)}
        _check_levels(claim, prefix, levels)
        parts += LEVEL_CHECKS[claim.check](f"{prefix}{claim.axis}", levels, claim.reference, len(groups))
    return runs, parts


def _check_levels(claim: Claim, prefix: str, levels: dict[Any, pd.Series]) -> None:
    found = f"{prefix}{claim.axis} {', '.join(map(short_value, levels))}"
    missing = (set(claim.levels or []) | ({claim.reference} - {None})) - levels.keys()
    least = 3 if claim.check == "rising" else 2
    if missing:
        raise _MissingRuns(f"{claim.axis} {', '.join(map(short_value, missing))} is missing: got {found}")
    if len(levels) < least:
        raise _MissingRuns(f"too few levels: got {found}; the check needs {least}")
    if not all(values.index.is_unique for values in levels.values()):
        raise _MissingRuns(f"{found}: a level has several runs of one seed, which differ in other settings")


def _above(label: str, a: pd.Series, b: pd.Series, k: int) -> Part:
    """Holds if a is above b. Refuted if a is below b, or if the two are equivalent."""
    difference, strict = paired_difference(a, b, 1 - LEVEL), paired_difference(a, b, 1 - LEVEL / k)
    if difference.low > 0:
        return Part(label, difference, True)
    equivalent = equivalence(a, b, level=LEVEL / k).verdict == "equivalent"
    return Part(label, difference, False if strict.high < 0 or equivalent else None, equivalent=equivalent)


def _equivalent(label: str, a: pd.Series, b: pd.Series, k: int) -> Part:
    """Holds if a and b are equivalent. The interval is that of the two one-sided tests."""
    tests = equivalence(a, b, level=LEVEL)
    different = equivalence(a, b, level=LEVEL / k).verdict == "different"
    holds = True if tests.verdict == "equivalent" else False if different else None
    return Part(label, Difference(*tests[1:]), holds, 1 - 2 * LEVEL)


def _less_overlap(label: str, a: pd.Series, b: pd.Series, k: int) -> Part:
    """Holds if the overlap a is below the overlap b. Refuted if it is above."""
    difference, strict = paired_difference(a, b, 1 - LEVEL), paired_difference(a, b, 1 - LEVEL / k)
    return Part(label, difference, True if difference.high < 0 else False if strict.low > 0 else None)


def _rising(axis: str, levels: dict[Any, pd.Series], reference: Any, groups: int) -> list[Part]:
    """One part per step: each level is above the next lower one."""
    steps = list(pairwise(sorted(levels)))
    return [_above(f"{axis} {b:g} minus {a:g}", levels[b], levels[a], len(steps) * groups) for a, b in steps]


def _each_minus_reference(check: Callable[..., Part]) -> Callable[..., list[Part]]:
    """Checks of each other level minus the reference."""

    def checked(axis: str, levels: dict[Any, pd.Series], reference: Any, groups: int) -> list[Part]:
        pairs = [(level, reference) for level in levels if level != reference]
        return _checked_pairs(check, axis, levels, pairs, groups)

    return checked


def _best(axis: str, levels: dict[Any, pd.Series], reference: Any, groups: int) -> list[Part]:
    """One part per other level: the reference is above it."""
    pairs = [(reference, level) for level in levels if level != reference]
    return _checked_pairs(_above, axis, levels, pairs, groups)


def _checked_pairs(
    check: Callable[..., Part], axis: str, levels: dict[Any, pd.Series], pairs: list[tuple[Any, Any]], groups: int
) -> list[Part]:
    """One part per pair (a, b) of levels, labelled "a minus b"."""
    k = len(pairs) * groups
    return [check(f"{axis} {short_value(a)} minus {short_value(b)}", levels[a], levels[b], k) for a, b in pairs]


def _no_gain(label: str, a: pd.Series, b: pd.Series, k: int) -> Part:
    """Holds if a minus b is below the margin (one-sided test). Refuted if it is above the margin."""
    one_sided, strict = paired_difference(a, b, 1 - 2 * LEVEL), paired_difference(a, b, 1 - LEVEL / k)
    holds = True if one_sided.high < EQUIVALENCE_MARGIN else False if strict.low > EQUIVALENCE_MARGIN else None
    return Part(label, one_sided, holds, 1 - 2 * LEVEL)


def _sensitive(axis: str, levels: dict[Any, pd.Series], reference: Any, groups: int) -> list[Part]:
    """One part: the best level minus the worst. It is the widest of k pairs, so it is tested at 5 % / k."""
    pairs = list(combinations(sorted(levels, key=lambda level: levels[level].mean()), 2))
    worst, best = pairs[len(levels) - 2]
    confidence = 1 - LEVEL / len(pairs)
    strict = paired_difference(levels[best], levels[worst], confidence)
    all_alike = all(equivalence(levels[a], levels[b], level=LEVEL).verdict == "equivalent" for a, b in pairs)
    holds = True if strict.low > EQUIVALENCE_MARGIN else False if all_alike else None
    return [Part(f"{axis} {best:g} minus {worst:g}", strict, holds, confidence)]


METHOD_CHECKS: dict[str, Callable[..., Part]] = {
    "above": _above,
    "equivalent": _equivalent,
    "less_overlap": _less_overlap,
}
LEVEL_CHECKS: dict[str, Callable[..., list[Part]]] = {
    "rising": _rising,
    "sensitive": _sensitive,
    "equivalent": _each_minus_reference(_equivalent),
    "no_gain": _each_minus_reference(_no_gain),
    "best": _best,
}
# Sort keys of the mean difference by which the worst part of a check comes first; for other checks, the largest
# difference in either direction is the worst.
WORST: dict[str, Callable[[float], float]] = {
    **dict.fromkeys(("above", "rising", "best"), lambda mean: mean),
    **dict.fromkeys(("no_gain", "less_overlap"), lambda mean: -mean),
}


def _judge_cost(cost: pd.DataFrame | None) -> _Judgement:
    if cost is None or len(cost) < 3:
        return _Judgement(NOT_RUN, *["the cost of the loss was not measured with this study"] * 2)
    exponent = float(np.polyfit(np.log(cost["batch_size"]), np.log(cost["seconds"]), 1)[0])
    measured = ", ".join(f"{row.batch_size:,.0f}: {1e3 * row.seconds:.0f} ms" for row in cost.itertuples())
    verdict = REPRODUCED if exponent <= 2.5 else REFUTED if exponent >= 3 else OPEN
    return _Judgement(verdict, f"exponent {exponent:.2f} ({measured})", f"exponent {exponent:.2f}")


def _compare_with_table(runs: pd.DataFrame) -> list[Part]:
    """One part per value of the paper's Table 1. Values on CUHK03 are means over the same splits as these runs."""
    compared = compare_with_published(runs)
    exact = compared[(compared["match"] == EXACT) & (compared["place"] == "Table 1")]
    if exact.empty:
        raise _MissingRuns("Table 1 has no value for this dataset, network and protocol")
    splits = runs["split"].nunique()
    if splits not in (1, SPLITS):
        raise _MissingRuns(f"the values of Table 1 are means over {SPLITS} splits: got runs of {splits}")
    return [_compare_with_value(row, runs[row.metric].to_numpy(), len(exact), splits > 1) for row in exact.itertuples()]


def _compare_with_value(row: Any, values: np.ndarray, k: int, same_splits: bool) -> Part:
    mean, low, high = t_interval(values - row.published)
    _, lowest, highest = t_interval(values - row.published, 1 - LEVEL / k)
    inside = low > -EQUIVALENCE_MARGIN and high < EQUIVALENCE_MARGIN
    if same_splits:  # Both means are over the same splits, so the interval over splits is too wide.
        inside = len(values) > 1 and abs(mean) < EQUIVALENCE_MARGIN
    outside = lowest > EQUIVALENCE_MARGIN or highest < -EQUIVALENCE_MARGIN
    difference = Difference(mean, low, high, len(values))
    holds = True if inside else False if outside else None
    return Part(f"{row.metric} minus the published {row.published}", difference, holds)
