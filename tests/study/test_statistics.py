"""Intervals and verdicts, compared with scipy, with naive versions and with their coverage in simulations."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hloss.study.statistics import (
    EQUIVALENCE_MARGIN,
    Difference,
    bootstrap_over_classes,
    differences_from,
    equivalence,
    paired_difference,
    t_interval,
)


def over_seeds(*values, first=0):
    return pd.Series(values, index=range(first, first + len(values)), dtype=float)


def test_interval_over_seeds_equals_scipy():
    values = np.random.default_rng(0).normal(42, 1.5, 5)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert t_interval(values, 0.9) == pytest.approx((values.mean(), *expected), abs=1e-12)


def test_single_seed_has_no_interval():
    mean, low, high = t_interval(np.array([41.5]))
    assert mean == 41.5
    assert np.isnan([low, high]).all()


def test_paired_difference_equals_scipy_over_the_common_seeds():
    rng = np.random.default_rng(1)
    a = pd.Series(rng.normal(44, 2, 5), index=[4, 0, 2, 1, 3])
    b = pd.Series(rng.normal(41, 2, 6), index=[1, 2, 3, 4, 7, 8])
    oracle = stats.ttest_rel(a.loc[[1, 2, 3, 4]], b.loc[[1, 2, 3, 4]])
    difference = paired_difference(a, b, confidence=0.8)
    assert difference[1:3] == pytest.approx(oracle.confidence_interval(0.8), abs=1e-12)
    assert difference.mean == pytest.approx(np.mean([a[s] - b[s] for s in (1, 2, 3, 4)]), abs=1e-12)
    assert difference.n == 4


def test_paired_difference_is_antisymmetric():
    a, b = over_seeds(40, 43, 41.5), over_seeds(39, 44, 42)
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert forth == pytest.approx(Difference(-back.mean, -back.high, -back.low, back.n), abs=1e-12)


def test_variation_shared_by_seeds_does_not_widen_the_interval():
    difference = paired_difference(over_seeds(0 + 3, 30 + 2, -20 + 4), over_seeds(0, 30, -20))
    assert difference == pytest.approx(Difference(*t_interval(np.array([3.0, 2.0, 4.0])), 3))


@pytest.mark.parametrize(("first", "n"), [(2, 1), (9, 0)])
def test_fewer_than_two_common_seeds_have_no_interval(first, n):
    difference = paired_difference(over_seeds(40, 41, 43), over_seeds(39, 38, 40, first=first))
    assert difference.n == n
    assert np.isnan([difference.low, difference.high]).all()
    assert np.isnan(difference.mean) == (n == 0)


def test_refuses_a_repeated_seed():
    with pytest.raises(ValueError, match=r"b must have one value per seed: got several for \[1\]"):
        paired_difference(over_seeds(1, 2), pd.Series([1.0, 2.0, 3.0], index=[0, 1, 1]))


def test_refuses_a_value_that_is_not_finite():
    with pytest.raises(ValueError, match="a must be finite: got"):
        equivalence(over_seeds(1, float("nan")), over_seeds(1, 2))


def one_sided_tests(differences, margin):
    """The larger p value of the two one-sided tests, by scipy."""
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return max(above, below)


@given(st.lists(st.integers(-300, 300), min_size=2, max_size=6, unique=True), st.sampled_from([0.01, 0.05, 0.1]))
def test_verdict_equals_the_tests_of_scipy(hundredths, level):
    differences = np.array(hundredths) / 100
    found = equivalence(over_seeds(*(50 + differences)), over_seeds(*[50] * len(differences)), level=level)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(1 - level)
    outside = low > EQUIVALENCE_MARGIN or high < -EQUIVALENCE_MARGIN
    p = one_sided_tests(differences, EQUIVALENCE_MARGIN)
    assert found.verdict == ("equivalent" if p < level else "different" if outside else "undecided")


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.1, -0.2, 0.0, 0.3, -0.1), "equivalent"),
        ((0.5, 0.5), "equivalent"),  # without any spread the interval is a point
        ((5.0, 5.5, 4.6, 5.2, 4.9), "different"),
        ((-5.0, -5.5, -4.6), "different"),
        ((1.0, 3.0, 0.5, 2.5, 1.5), "undecided"),
        ((1.0, 1.2, 0.9, 1.1, 1.0), "equivalent"),  # above zero, but within the margin
        ((3.0, 2.2, 3.8), "undecided"),  # the mean is outside the margin, the interval is not
        ((0.0,), "undecided"),
        ((), "undecided"),
    ],
)
def test_equivalent_different_or_undecided(differences, verdict):
    a, b = over_seeds(*(40 + d for d in differences)), over_seeds(*(40 for _ in differences))
    assert equivalence(a, b).verdict == verdict


def test_equivalence_returns_the_interval_of_its_tests():
    found = equivalence(over_seeds(40.1, 39.8, 40.4), over_seeds(40, 40, 40))
    assert found[1:] == pytest.approx(paired_difference(over_seeds(0.1, -0.2, 0.4), over_seeds(0, 0, 0), 0.9))


@pytest.mark.parametrize("wrong", [{"margin": 0.0}, {"margin": -1.0}, {"level": 0.0}, {"level": 0.5}])
def test_refuses_a_margin_or_level_out_of_range(wrong):
    with pytest.raises(ValueError, match="margin must be above 0"):
        equivalence(over_seeds(1, 2), over_seeds(1, 2), **wrong)


def test_method_with_missing_runs_has_no_verdict():
    rows = [("histogram", 40.0), ("lifted", 45.0), ("triplet", 30.0)]
    results = pd.DataFrame(
        [{"method": m, "seed": s, "recall@1": r + s / 10, "complete": True} for m, r in rows for s in range(5)]
    )
    assert differences_from(results, "histogram")["verdict"].tolist() == ["different", "different"]
    results.loc[7, ["complete", "recall@1"]] = False, np.nan
    half = differences_from(results, "histogram").set_index("method")
    assert half["verdict"].to_dict() == {"lifted": "not run", "triplet": "different"}
    assert half.loc["lifted", ["minus histogram", "n"]].tolist() == pytest.approx([5, 4])
    assert set(differences_from(results, "lifted")["verdict"]) == {"not run"}


def run_of(rng, n_classes):
    """Hits and classes of one run: 10 to 16 queries per class; larger classes are harder."""
    sizes = rng.integers(10, 17, n_classes)
    classes = np.repeat(np.arange(n_classes), sizes)
    mean = TRUE_RATE[sizes]
    easiness = rng.beta(5 * mean, 5 * (1 - mean))
    return rng.random(len(classes)) < easiness[classes], classes


TRUE_RATE = np.linspace(1.0, 0.04, 17)  # by class size: 0.4 at 10 queries, 0.04 at 16
TRUE_MEAN = (np.arange(10, 17) * TRUE_RATE[10:]).sum() / np.arange(10, 17).sum()


def naive_bootstrap(hits, classes, generator, resamples):
    """For each resample, concatenate the queries of the classes drawn and average."""
    members = [hits[classes == c] for c in np.unique(classes)]
    draws = generator.integers(len(members), size=(resamples, len(members)))
    means = [np.concatenate([members[c] for c in draw]).mean() for draw in draws]
    return np.quantile(means, [0.025, 0.975])


def test_bootstrap_over_classes_equals_a_naive_version():
    hits, classes = run_of(np.random.default_rng(0), 60)
    mean, low, high = bootstrap_over_classes(hits, classes, np.random.default_rng(1), resamples=20_000)
    naive = naive_bootstrap(hits, classes, np.random.default_rng(2), resamples=20_000)
    assert mean == pytest.approx(hits.mean(), abs=1e-12)
    assert (low, high) == pytest.approx(naive, abs=0.03 * (high - low))


def test_bootstrap_does_not_depend_on_order_or_class_names():
    hits, classes = run_of(np.random.default_rng(3), 30)
    first = bootstrap_over_classes(hits, classes, np.random.default_rng(4))
    order = np.random.default_rng(5).permutation(len(hits))
    names = np.array([f"class {c:03}" for c in classes])
    assert bootstrap_over_classes(hits[order], names[order], np.random.default_rng(4)) == first
    assert bootstrap_over_classes(hits, classes, np.random.default_rng(6)) != first


def test_bootstrap_of_many_classes_in_batches():
    classes = np.arange(5_000).repeat(2)
    hits = np.random.default_rng(0).random(10_000) < 0.7
    mean, low, high = bootstrap_over_classes(hits, classes, np.random.default_rng(1), resamples=1_000)
    spread = 2 * stats.norm.ppf(0.975) * hits.reshape(-1, 2).mean(1).std() / np.sqrt(5_000)
    assert low < mean < high
    assert high - low == pytest.approx(spread, rel=0.1)


def test_single_class_has_no_interval():
    mean, low, high = bootstrap_over_classes([True, False], [3, 3], np.random.default_rng(0))
    assert mean == 0.5
    assert np.isnan([low, high]).all()


def test_constant_hits_have_an_interval_of_zero_width():
    assert bootstrap_over_classes(np.ones(6), np.arange(6) // 2, np.random.default_rng(0)) == (1, 1, 1)


@pytest.mark.parametrize(("hits", "classes"), [([1, 0], [0]), ([], []), ([float("nan"), 1.0], [0, 1]), ([[1]], [[0]])])
def test_refuses_hits_that_do_not_match_their_classes(hits, classes):
    with pytest.raises(ValueError, match="hits and classes must have one dimension"):
        bootstrap_over_classes(hits, classes, np.random.default_rng(0))


# Simulations: 95 % intervals must cover the true value in 93 to 97 % of cases. Comments give the standard error.


def covered(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_over_few_seeds_cover_95_percent(n):
    runs = np.random.default_rng(0).normal(42, 1.5, (5_000, n))  # standard error 0.3 %
    assert 0.93 < covered([t_interval(values)[1:] for values in runs], 42) < 0.97
    naive = [np.quantile(values[np.random.default_rng(1).integers(n, size=(500, n))].mean(1), [0.025, 0.975])
             for values in runs[:1_000]]  # fmt: skip
    assert covered(naive, 42) < 0.9, "the simulation cannot fail: it accepts a bootstrap over seeds"


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_of_paired_differences_cover_95_percent(n):
    rng = np.random.default_rng(2)
    found = []
    for _ in range(3_000):  # standard error 0.4 %
        shared = rng.normal(0, 3, n)
        a, b = over_seeds(*(43 + shared + rng.normal(0, 1, n))), over_seeds(*(42 + shared + rng.normal(0, 0.5, n)))
        found.append(paired_difference(a, b)[1:3])
    assert 0.93 < covered(found, 1) < 0.97


@pytest.mark.parametrize("classes", [100, 400])  # test classes of CUB-200-2011 and CUHK03, and of glyphs
def test_intervals_over_classes_cover_95_percent_and_intervals_over_queries_do_not(classes):
    rng = np.random.default_rng(5)
    runs = [run_of(rng, classes) for _ in range(240_000 // classes)]  # standard error at most 0.9 %
    found = [bootstrap_over_classes(*run, rng, resamples=500)[1:] for run in runs]
    assert 0.93 < covered(found, TRUE_MEAN) < 0.97
    means = np.array([hits.mean() for hits, _ in runs])
    half = 1.96 * np.sqrt(means * (1 - means) / [len(hits) for hits, _ in runs])
    assert covered(zip(means - half, means + half, strict=True), TRUE_MEAN) < 0.85


@pytest.mark.parametrize("n", [3, 5])
def test_equivalence_test_has_a_size_of_5_percent(n):
    """A true difference equal to the margin is called equivalent in 5 % of cases."""
    rng = np.random.default_rng(3)
    runs = rng.normal(42 + EQUIVALENCE_MARGIN, 0.5, (2_000, n))
    verdicts = [equivalence(over_seeds(*run), over_seeds(*[42] * n)).verdict for run in runs]
    assert 0.035 < verdicts.count("equivalent") / len(verdicts) < 0.065  # standard error 0.5 %
    assert verdicts.count("different") / len(verdicts) < 0.035  # one side of the 95 % interval


def test_equivalence_test_has_a_power_of_80_percent_at_five_seeds():
    """The spread of 0.8 points is typical of paired differences on glyphs."""
    rng = np.random.default_rng(4)
    verdicts = [equivalence(over_seeds(*rng.normal(42, 0.8, 5)), over_seeds(*[42] * 5)).verdict for _ in range(500)]
    assert verdicts.count("equivalent") > 0.8 * len(verdicts)
    assert verdicts.count("different") == 0


def test_t_interval_equals_the_textbook_formula():
    mean, low, high = t_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * 1.290994 / 2  # t quantile for 3 degrees of freedom, standard deviation, root of n
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-5)
