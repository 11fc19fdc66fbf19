"""The paper's claims as checks over a study's results: what each says, by what it is judged, and the verdict.

`reports/claims.yaml` holds the claims. A claim is judged on each dataset of a study and in each of its comparisons, and
only when every run that it needs is complete. A verdict is made of parts, one per pair of methods or levels: it is
"reproduced" if all hold, "not reproduced" if one is refuted, "inconclusive" otherwise. Refutations are looked for among
k parts, so each is tested at 5 % / k (Bonferroni); that all hold needs no such care. That one method is above another
is refuted if it is below, and also if the two are equivalent.
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
SPLITS = 5  # of CUHK03: a published value is the mean over them


class Claim(BaseModel):
    """A row of `reports/claims.yaml`."""

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
    """Label, difference with its interval, and outcome.

    Attributes:
        label: what is compared, as in "histogram less triplet".
        difference: in points of Recall@1, or of the shared mass.
        holds: whether the part of the claim holds; False: it is refuted, by a stricter interval; None: open.
        confidence: of the interval of `difference`.
    """

    label: str
    difference: Difference
    holds: bool | None
    confidence: float = 1 - LEVEL

    def __str__(self) -> str:
        mean, low, high, n = self.difference
        if n < 2:
            return f"{self.label}: {mean:+.1f} (one seed)" if n else f"{self.label}: no seed in common"
        return f"{self.label}: {mean:+.1f} ({100 * self.confidence:.3g} %: {low:+.1f} to {high:+.1f}, n = {n})"


class _MissingRuns(Exception):
    """Runs that a claim needs are missing or not complete; the message says which."""


def read_claims(file: str = CLAIMS) -> list[Claim]:
    """The claims in the order of their file. ConfigError names what is wrong in it."""
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
    """The verdicts on the claims, one row per claim, dataset and comparison.

    Columns: claim, text, section, criterion, dataset, asked ("the paper's data", "other data" or, for the cost, "no
    data"), comparison, verdict, evidence (in words), run_ids (of the runs that the verdict rests on).

    Args:
        results: of `hloss.study.results.read_results`.
        cost: seconds of the loss by batch size (columns batch_size, seconds), for the claim on its cost.
        claims: those to judge; None: all of `reports/claims.yaml`.
    """
    rows = []
    for claim in read_claims() if claims is None else claims:
        if claim.check == "quadratic":
            rows.append(_verdict_row(claim, "any", "", *_judge_cost(cost), ""))
            continue
        for dataset, runs in results.groupby("dataset", sort=False):
            for comparison in claim.comparison:
                compared = runs[runs["comparison"] == comparison]
                rows.append(_verdict_row(claim, str(dataset), comparison, *_judge_runs(claim, compared)))
    return pd.DataFrame(rows)


def overlap(results: pd.DataFrame) -> pd.Series:
    """Share of mass that the two densities of test similarities have in common, in %: sum of min(h+, h-)."""
    pairs = zip(results["positive_after"], results["negative_after"], strict=True)
    return pd.Series([100 * np.minimum(p, n).sum() for p, n in pairs], index=results.index)


def _verdict_row(
    claim: Claim, dataset: str, comparison: str, verdict: str, evidence: str, run_ids: str
) -> dict[str, str]:
    asked = "the paper's data" if dataset in claim.data else "other data" if claim.data else "no data"
    return {
        "claim": claim.name,
        "text": claim.claim,
        "section": claim.section,
        "criterion": claim.criterion,
        "dataset": dataset,
        "asked": asked,
        "comparison": comparison,
        "verdict": verdict,
        "evidence": evidence,
        "run_ids": run_ids,
    }


def _judge_runs(claim: Claim, runs: pd.DataFrame) -> tuple[str, str, str]:
    try:
        if claim.check == "table":
            used = _complete_runs(runs, claim.among)
            return *_judge_table(used), ", ".join(used["run_id"])
        used, parts = (_compare_levels if claim.method is None else _compare_methods)(claim, runs)
    except _MissingRuns as missing:
        return NOT_RUN, str(missing), ""
    evidence = [*map(str, parts), *([f"published: {claim.published}"] if claim.published else [])]
    return _combined_verdict(parts), "; ".join(evidence), ", ".join(sorted(set(used["run_id"])))


def _combined_verdict(parts: list[Part]) -> str:
    if any(part.holds is False for part in parts):
        return REFUTED
    return REPRODUCED if all(part.holds for part in parts) else OPEN


def _complete_runs(runs: pd.DataFrame, settings: dict[str, Any]) -> pd.DataFrame:
    """The runs with these settings, all of which must be complete. A list: any of its values; None: not set."""
    for name, value in settings.items():
        allowed = value if isinstance(value, list) else [value]
        column = runs[name] if name in runs else pd.Series(None, index=runs.index, dtype=object)
        runs = runs[column.isin([v for v in allowed if v is not None]) | (column.isna() & (None in allowed))]
    shown = f" ({', '.join(f'{name} {value}' for name, value in settings.items())})" if settings else ""
    if runs.empty:
        raise _MissingRuns(f"no such runs here{shown}")
    if not runs["complete"].all():
        raise _MissingRuns(f"{(~runs['complete']).sum()} of {len(runs)} runs are missing{shown}")
    return runs


def _runs_of_method(runs: pd.DataFrame, settings: dict[str, Any]) -> pd.DataFrame:
    """The runs with these settings, which must be those of one method."""
    runs = _complete_runs(runs, settings)
    methods = runs["method"].unique()
    if len(methods) > 1:
        raise _MissingRuns(f"several methods, not one: {'; '.join(methods)}")
    return runs


def _values_by_seed(runs: pd.DataFrame, values: pd.Series | None = None) -> pd.Series:
    """Recall@1, or other values of these runs, by seed."""
    chosen = runs["recall@1"] if values is None else values[runs.index]
    return pd.Series(chosen.to_numpy(), index=runs["seed"].to_numpy())


def _compare_methods(claim: Claim, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Part]]:
    """The runs of the method and of its rivals, and a part per rival."""
    assert claim.method is not None
    ours, rivals = _runs_of_method(runs, claim.method), [_runs_of_method(runs, rival) for rival in claim.rivals or []]
    shares = overlap(pd.concat([ours, *rivals])) if claim.check == "less_overlap" else None
    parts = []
    for rival in rivals:
        label = f"{ours['method'].iloc[0]} less {rival['method'].iloc[0]}"
        parts.append(
            PAIRS[claim.check](label, _values_by_seed(ours, shares), _values_by_seed(rival, shares), len(rivals))
        )
    return pd.concat([ours, *rivals]), parts


def _compare_levels(claim: Claim, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Part]]:
    """The runs of the levels of the claim's axis, and its parts: of each group of runs, if it names a `within`."""
    assert claim.axis is not None
    runs = _complete_runs(runs, claim.among | ({} if claim.levels is None else {claim.axis: claim.levels}))
    groups = [("", runs)] if claim.within is None else [
        (f"{claim.within} {value}: ", group) for value, group in runs.groupby(claim.within)
    ]  # fmt: skip
    parts: list[Part] = []
    for prefix, group in groups:
        levels = {level: _values_by_seed(rows) for level, rows in group.groupby(claim.axis)}
        _check_levels(claim, prefix, levels)
        parts += AXES[claim.check](prefix, levels, claim.reference, len(groups))
    return runs, parts


def _check_levels(claim: Claim, prefix: str, levels: dict[Any, pd.Series]) -> None:
    found = f"{prefix}{claim.axis} {', '.join(map(short_value, levels))}"
    lacking = set(claim.levels or []) | ({claim.reference} - {None})
    lacking -= levels.keys()
    if lacking:
        raise _MissingRuns(f"{found} without {', '.join(map(short_value, lacking))}")
    if len(levels) < (3 if claim.check == "rising" else 2):
        raise _MissingRuns(f"{found} are too few")
    if not all(values.index.is_unique for values in levels.values()):
        raise _MissingRuns(f"{found}: more than one run of a seed differs in other settings")


def _above(label: str, a: pd.Series, b: pd.Series, k: int) -> Part:
    """a above b; refuted if it is below, or if the two are equivalent."""
    difference, strict = paired_difference(a, b, 1 - LEVEL), paired_difference(a, b, 1 - LEVEL / k)
    holds = True if difference.low > 0 else None
    if holds is None and (strict.high < 0 or equivalence(a, b, level=LEVEL / k).verdict == "equivalent"):
        holds = False
    return Part(label, difference, holds)


def _equivalent(label: str, a: pd.Series, b: pd.Series, k: int) -> Part:
    """a and b within the margin; the interval of the two one-sided tests."""
    tests = equivalence(a, b, level=LEVEL)
    different = equivalence(a, b, level=LEVEL / k).verdict == "different"
    holds = True if tests.verdict == "equivalent" else False if different else None
    return Part(label, Difference(*tests[1:]), holds, 1 - 2 * LEVEL)


def _less_overlap(label: str, a: pd.Series, b: pd.Series, k: int) -> Part:
    """The densities of a share less mass than those of b; refuted if they share more."""
    difference, strict = paired_difference(a, b, 1 - LEVEL), paired_difference(a, b, 1 - LEVEL / k)
    return Part(label, difference, True if difference.high < 0 else False if strict.low > 0 else None)


def _rising(prefix: str, levels: dict[Any, pd.Series], reference: Any, groups: int) -> list[Part]:
    steps = list(pairwise(sorted(levels)))
    return [_above(f"{prefix}{b:g} less {a:g}", levels[b], levels[a], len(steps) * groups) for a, b in steps]


def _each_with_reference(check: Callable[..., Part], toward: int) -> Callable[..., list[Part]]:
    """A check of each other level against the reference; toward=-1: of the reference against each other level."""

    def checked(prefix: str, levels: dict[Any, pd.Series], reference: Any, groups: int) -> list[Part]:
        others = [level for level in levels if level != reference]
        parts = []
        for level in others:
            a, b = (level, reference)[::toward]
            parts.append(
                check(f"{prefix}{short_value(a)} less {short_value(b)}", levels[a], levels[b], len(others) * groups)
            )
        return parts

    return checked


def _no_gain(label: str, a: pd.Series, b: pd.Series, k: int) -> Part:
    """a is above b by less than the margin (a one-sided test); refuted if it is above by more."""
    one_sided, strict = paired_difference(a, b, 1 - 2 * LEVEL), paired_difference(a, b, 1 - LEVEL / k)
    holds = True if one_sided.high < EQUIVALENCE_MARGIN else False if strict.low > EQUIVALENCE_MARGIN else None
    return Part(label, one_sided, holds, 1 - 2 * LEVEL)


def _sensitive(prefix: str, levels: dict[Any, pd.Series], reference: Any, groups: int) -> list[Part]:
    """The two levels that lie furthest apart. They are selected among k pairs, so that each test is at 5 % / k."""
    pairs = list(combinations(sorted(levels, key=lambda level: levels[level].mean()), 2))
    worst, best = pairs[len(levels) - 2]
    confidence = 1 - LEVEL / len(pairs)
    strict = paired_difference(levels[best], levels[worst], confidence)
    all_alike = all(equivalence(levels[a], levels[b], level=LEVEL).verdict == "equivalent" for a, b in pairs)
    holds = True if strict.low > EQUIVALENCE_MARGIN else False if all_alike else None
    return [Part(f"{prefix}{best:g} less {worst:g}", strict, holds, confidence)]


PAIRS: dict[str, Callable[..., Part]] = {"above": _above, "equivalent": _equivalent, "less_overlap": _less_overlap}
AXES: dict[str, Callable[..., list[Part]]] = {
    "rising": _rising,
    "sensitive": _sensitive,
    "equivalent": _each_with_reference(_equivalent, 1),
    "no_gain": _each_with_reference(_no_gain, 1),
    "best": _each_with_reference(_above, -1),
}


def _judge_cost(cost: pd.DataFrame | None) -> tuple[str, str]:
    if cost is None or len(cost) < 3:
        return NOT_RUN, "the cost of the loss was not measured with this study"
    exponent = float(np.polyfit(np.log(cost["batch_size"]), np.log(cost["seconds"]), 1)[0])
    measured = ", ".join(f"{row.batch_size:,.0f}: {1e3 * row.seconds:.0f} ms" for row in cost.itertuples())
    verdict = REPRODUCED if exponent <= 2.5 else REFUTED if exponent >= 3 else OPEN
    return verdict, f"exponent {exponent:.2f} ({measured})"


def _judge_table(runs: pd.DataFrame) -> tuple[str, str]:
    """The values of the paper's Table 1; those on CUHK03 are means over the same splits as these runs."""
    compared = compare_with_published(runs)
    exact = compared[(compared["match"] == EXACT) & (compared["place"] == "Table 1")]
    if exact.empty:
        raise _MissingRuns("no value of Table 1 is of this data, network and protocol")
    splits = runs["split"].nunique()
    if splits not in (1, SPLITS):
        raise _MissingRuns(f"the values of Table 1 are means over {SPLITS} splits, these runs are of {splits}")
    parts = [_compare_with_value(row, runs[row.metric].to_numpy(), len(exact), splits > 1)
             for row in exact.itertuples()]  # fmt: skip
    return _combined_verdict(parts), "; ".join(map(str, parts))


def _compare_with_value(row: Any, values: np.ndarray, k: int, same_splits: bool) -> Part:
    mean, low, high = t_interval(values - row.published)
    _, lowest, highest = t_interval(values - row.published, 1 - LEVEL / k)
    inside = low > -EQUIVALENCE_MARGIN and high < EQUIVALENCE_MARGIN
    if same_splits:  # both means are over the same splits, so that the interval over splits is too wide
        inside = len(values) > 1 and abs(mean) < EQUIVALENCE_MARGIN
    outside = lowest > EQUIVALENCE_MARGIN or highest < -EQUIVALENCE_MARGIN
    difference = Difference(mean, low, high, len(values))
    holds = True if inside else False if outside else None
    return Part(f"{row.metric} less the published {row.published}", difference, holds)
