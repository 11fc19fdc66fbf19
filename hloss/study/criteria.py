"""Criteria of claims: each turns a difference, or the levels of a setting, into parts with two p values.

A part holds if its first p value is below `LEVEL`. It is refuted if its second p value, times the number of parts of
the claim, is below `LEVEL` (Bonferroni: one refuted part refutes the claim). The p values that parts hold need no
correction, because a claim is reproduced only if all of its parts hold (intersection-union test).

- above: a is above b. Refuted if a is below b, and also if the two are equivalent.
- equivalent: a and b differ by less than the margin, in either direction (two one-sided tests).
- not_below: a is not below b by the margin or more (non-inferiority).
- no_gain: a is not above b by the margin or more (no superiority).
- less_overlap: a is below b.
- best: the reference is above every other level. near_best: it is not below any by the margin or more.
- sensitive: the best level is above the worst by more than the margin. Refuted if all levels are equivalent.
"""

import math
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import combinations
from math import inf
from typing import Any, NamedTuple

import pandas as pd

from hloss.study.estimates import SEEDS_AND_CLASSES, Estimate, paired_difference
from hloss.study.spec import short_value

LEVEL = 0.05
MOST_SEEDS = 100  # a larger number of seeds that a verdict needs is not computed
REPRODUCED, REFUTED, OPEN, NOT_RUN = "reproduced", "not reproduced", "inconclusive", "not run"


class Part(NamedTuple):
    """One comparison of a claim.

    Attributes:
        label: the compared pair, as in "histogram minus triplet".
        difference: in points of Recall@K, or in % of the mass for overlaps.
        p_holds: p value of the test that the part holds.
        p_refuted: p value of the test that it does not, before the correction for the number of parts.
        confidence: confidence of the interval to show.
        note: text that the evidence shows after the numbers.
        is_tested: False if the part is a comparison of numbers without a test.
        unit: unit of the difference.
        margin: largest negligible difference; NaN if the criterion has none.
        holds: bounds of the true differences for which the part holds.
        with_more: the part for the same mean and spread, for arguments of `Estimate.with_more`; None without a test.
    """

    label: str
    difference: Estimate
    p_holds: float
    p_refuted: float
    confidence: float = 1 - LEVEL
    note: str = ""
    is_tested: bool = True
    unit: str = "points"
    margin: float = math.nan
    holds: tuple[float, float] = (-inf, inf)
    with_more: Callable[[int, bool], "Part"] | None = None

    def numbers(self) -> dict[str, Any]:
        """The numbers of the part for a table; unknown numbers and missing bounds are NaN."""
        low, high = self.difference.interval(self.confidence) if self.is_tested else (math.nan, math.nan)
        bounds = (bound if math.isfinite(bound) else math.nan for bound in self.holds)
        return {
            "difference": self.difference.mean,
            "low": low,
            "high": high,
            "confidence": 100 * self.confidence if math.isfinite(low) else math.nan,
            "n": self.difference.n,
            "unit": self.unit,
            "margin": self.margin,
            **dict(zip(("holds above", "holds below"), bounds, strict=True)),
        }

    def __str__(self) -> str:
        mean, n, varies = self.difference.mean, self.difference.n, self.difference.varies
        if not self.is_tested:
            return f"{self.label}: {_points(mean)}{self.note}"
        if n < 2:
            return f"{self.label}: {_points(mean)} (one seed)" if n else f"{self.label}: no common seed"
        low, high = self.difference.interval(self.confidence)
        interval = f"{100 * self.confidence:.3g} % CI {_points(low)} to {_points(high)} over {varies}, n = {n}"
        return f"{self.label}: {_points(mean)} ({interval}{self.note})"


def _points(value: float) -> str:
    """A number with a sign and one decimal; a value that rounds to zero is +0.0."""
    return f"{round(value, 1) + 0.0:+.1f}"


def _repeatable(criterion: Callable[[str, Estimate, float], Part]) -> Callable[[str, Estimate, float], Part]:
    """Fill the field `with_more` of the parts of a criterion."""

    @wraps(criterion)
    def apply(label: str, difference: Estimate, margin: float) -> Part:
        part = criterion(label, difference, margin)
        return part._replace(with_more=lambda *more: apply(label, difference.with_more(*more), margin))

    return apply


@_repeatable
def above(label: str, difference: Estimate, margin: float) -> Part:
    """Apply the criterion `above` of the module's docstring.

    Args:
        label: the compared pair, as in "histogram minus triplet".
        difference: a minus b.
        margin: largest negligible difference, in the unit of the difference; 0: equivalence does not refute.

    Returns:
        The part with its p values.
    """
    p_holds, p_equivalent = min(1.0, 2 * difference.p_above(0)), difference.p_within(margin)
    p_refuted = 1.0 if p_holds < LEVEL else min(1.0, 2 * difference.p_below(0), p_equivalent)
    note = ", equivalent" * (p_holds >= LEVEL > p_equivalent)
    return Part(label, difference, p_holds, p_refuted, note=note, margin=margin or math.nan, holds=(0, inf))


@_repeatable
def equivalent(label: str, difference: Estimate, margin: float) -> Part:
    """Apply the criterion `equivalent` of the module's docstring.

    Args:
        label: as in `above`.
        difference: a minus b.
        margin: largest negligible difference, in the unit of the difference.

    Returns:
        The part with its p values.
    """
    p_holds, p_refuted = difference.p_within(margin), difference.p_outside(margin)
    return Part(label, difference, p_holds, p_refuted, 1 - 2 * LEVEL, margin=margin, holds=(-margin, margin))


@_repeatable
def not_below(label: str, difference: Estimate, margin: float) -> Part:
    """Apply the criterion `not_below` of the module's docstring.

    Args:
        label: as in `above`.
        difference: a minus b.
        margin: largest negligible difference, in the unit of the difference.

    Returns:
        The part with its p values.
    """
    p_refuted = min(1.0, 2 * difference.p_below(-margin))
    p_holds = difference.p_above(-margin)
    return Part(label, difference, p_holds, p_refuted, 1 - 2 * LEVEL, margin=margin, holds=(-margin, inf))


@_repeatable
def no_gain(label: str, difference: Estimate, margin: float) -> Part:
    """Apply the criterion `no_gain` of the module's docstring.

    Args:
        label: as in `above`.
        difference: a minus b.
        margin: largest negligible difference, in the unit of the difference.

    Returns:
        The part with its p values.
    """
    p_refuted = min(1.0, 2 * difference.p_above(margin))
    p_holds = difference.p_below(margin)
    return Part(label, difference, p_holds, p_refuted, 1 - 2 * LEVEL, margin=margin, holds=(-inf, margin))


@_repeatable
def less_overlap(label: str, difference: Estimate, margin: float) -> Part:
    """Apply the criterion `less_overlap` of the module's docstring.

    Args:
        label: as in `above`.
        difference: a minus b, in % of the mass.
        margin: ignored.

    Returns:
        The part with its p values.
    """
    p_below, p_above = (min(1.0, 2 * p) for p in (difference.p_below(0), difference.p_above(0)))
    return Part(label, difference, p_below, p_above, unit="% of the mass", holds=(-inf, 0))


def each_minus_reference(criterion: Callable[..., Part]) -> Callable[..., list[Part]]:
    """Turn a criterion for differences into one for levels: each other level minus the reference.

    Args:
        criterion: a function such as `equivalent`.

    Returns:
        A function of the axis, its levels (value -> runs), the reference, the margin and the compared column, which
        returns one part per other level.
    """

    def parts(axis: str, levels: dict[Any, pd.DataFrame], reference: Any, margin: float, column: str) -> list[Part]:
        pairs = [(level, reference) for level in levels if level != reference]
        return _parts_of_pairs(criterion, axis, levels, pairs, margin, column)

    return parts


def reference_minus_each(criterion: Callable[..., Part]) -> Callable[..., list[Part]]:
    """Turn a criterion for differences into one for levels: the reference minus each other level.

    Args:
        criterion: a function such as `above`.

    Returns:
        A function as in `each_minus_reference`.
    """

    def parts(axis: str, levels: dict[Any, pd.DataFrame], reference: Any, margin: float, column: str) -> list[Part]:
        pairs = [(reference, level) for level in levels if level != reference]
        return _parts_of_pairs(criterion, axis, levels, pairs, margin, column)

    return parts


def _parts_of_pairs(
    criterion: Callable[..., Part],
    axis: str,
    levels: dict[Any, pd.DataFrame],
    pairs: Iterable[tuple[Any, Any]],
    margin: float,
    column: str,
) -> list[Part]:
    """One part per pair (a, b) of levels, labelled "a minus b"."""
    return [
        criterion(
            f"{axis} {short_value(a)} minus {short_value(b)}",
            paired_difference(levels[a], levels[b], column),
            margin,
        )
        for a, b in pairs
    ]


def sensitive(axis: str, levels: dict[Any, pd.DataFrame], reference: Any, margin: float, column: str) -> list[Part]:
    """Apply the criterion `sensitive`: one part, the best level minus the worst.

    This pair has the largest of k differences, so its p value is multiplied by k.

    Args:
        axis: name of the compared setting.
        levels: value of the setting -> its runs.
        reference: ignored.
        margin: the threshold, in points.
        column: the compared column.

    Returns:
        A list of one part.
    """
    ordered = sorted(levels, key=lambda level: levels[level][column].mean())
    label = f"{axis} {short_value(ordered[-1])} minus {short_value(ordered[0])}"
    widest = paired_difference(levels[ordered[-1]], levels[ordered[0]], column)
    pairs = [paired_difference(levels[b], levels[a], column) for a, b in combinations(ordered, 2)]
    return [_sensitive(label, widest, pairs, margin)]


def _sensitive(label: str, widest: Estimate, pairs: list[Estimate], margin: float) -> Part:
    """Part of the criterion `sensitive`, for the widest of the differences between pairs, and for all of them."""
    p_holds = min(1.0, 2 * widest.p_above(margin) * len(pairs))
    p_alike = max(pair.p_within(margin) for pair in pairs)
    confidence = 1 - LEVEL / len(pairs)

    def again(*more: Any) -> Part:
        return _sensitive(label, widest.with_more(*more), [pair.with_more(*more) for pair in pairs], margin)

    return Part(label, widest, p_holds, p_alike, confidence, margin=margin, holds=(margin, inf), with_more=again)


METHOD_CRITERIA: dict[str, Callable[[str, Estimate, float], Part]] = {
    "above": above,
    "equivalent": equivalent,
    "not_below": not_below,
    "less_overlap": less_overlap,
}
LEVEL_CRITERIA: dict[str, Callable[..., list[Part]]] = {
    "equivalent": each_minus_reference(equivalent),
    "not_below": each_minus_reference(not_below),
    "no_gain": each_minus_reference(no_gain),
    "best": reference_minus_each(above),
    "near_best": reference_minus_each(not_below),
    "sensitive": sensitive,
}


def p_values(parts: list[Part]) -> tuple[float, float]:
    """P values of a claim.

    Args:
        parts: all parts of the claim.

    Returns:
        The p values that all parts hold, and that at least one part is refuted.
    """
    refuted = min(part.p_refuted for part in parts)
    return max(part.p_holds for part in parts), min(1.0, len(parts) * refuted)


def verdict(p_holds: float, p_refuted: float) -> str:
    """The verdict that follows from the p values of a claim.

    Args:
        p_holds: first value of `p_values`.
        p_refuted: second value of `p_values`.

    Returns:
        `REPRODUCED`, `REFUTED` or `OPEN`.
    """
    return REFUTED if p_refuted < LEVEL else REPRODUCED if p_holds < LEVEL else OPEN


def needed(parts: list[Part]) -> str:
    """Estimate the seeds or test classes that would decide an open claim, if means and spreads stay as they are.

    Args:
        parts: the parts of the claim.

    Returns:
        A text:

        - "8 seeds": the smallest number with which the claim is reproduced or refuted, or "more than 100 seeds";
        - "8 seeds, each with test classes of its own": the same if each seed has its own test classes;
        - "more test classes": the variation of the test classes keeps the claim open, which more seeds do not reduce;
        - "at least 2 seeds": a part has fewer;
        - "": the claim is decided, or a part has no test.
    """
    if verdict(*p_values(parts)) != OPEN or not all(part.is_tested for part in parts):
        return ""
    if any(part.difference.n < 2 for part in parts):
        return "at least 2 seeds"
    first = max(part.difference.n for part in parts)
    fewest = next((n for n in range(first + 1, MOST_SEEDS + 1) if _decides(parts, n, False)), 0)
    if not fewest and _decides(parts, MOST_SEEDS, True):
        return "more test classes"
    own = any(part.difference.varies == SEEDS_AND_CLASSES and part.difference.share == 1 for part in parts)
    number = f"{fewest or f'more than {MOST_SEEDS}'} seeds"
    return number + ", each with test classes of its own" * own


def _decides(parts: list[Part], n: int, more_classes: bool) -> bool:
    """Whether n seeds, and proportionally more classes if asked, with the same means and spreads decide a claim."""
    more = [part.with_more(n, more_classes) for part in parts if part.with_more]
    return verdict(*p_values(more)) != OPEN


def decisive_part(parts: list[Part]) -> Part:
    """The part that decides a verdict: the worst refuted part, else the worst open part, else the worst part.

    The worst part is the one whose difference lies farthest outside its bounds, or the least inside them.

    Args:
        parts: all parts of the claim.
    """

    def order(part: Part) -> tuple[int, float]:
        outcome = verdict(part.p_holds, min(1.0, len(parts) * part.p_refuted))
        low, high = part.holds
        inside = min(part.difference.mean - low, high - part.difference.mean)
        return (REFUTED, OPEN, REPRODUCED).index(outcome), inside

    return min(parts, key=order)
