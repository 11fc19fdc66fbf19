"""Bootstrap over the classes of one run, and tables of differences: naive versions, and coverage in a simulation."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hloss.study.statistics import bootstrap_over_classes, differences_from, late_gain, shown_mean


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


def test_late_gain_is_what_validation_rose_in_the_second_half():
    rows = [
        (200, [50, 100, 150, 200], [0.1, 0.3, 0.2, 0.35]),
        (200, [50, 100, 150, 200], [0.1, 0.3, 0.2, 0.25]),
        (100, [50, 100], [0.2, 0.6]),
        (50, [50], [0.2]),
    ]
    runs = pd.DataFrame(rows, columns=["length", "history_iteration", "history_recall"], index=[3, 1, 2, 0])
    assert late_gain(runs).to_dict() == pytest.approx({3: 5, 1: 0, 2: 40, 0: np.nan}, nan_ok=True)


def test_mean_is_shown_with_its_interval():
    row = pd.Series({"slope": -0.125, "slope low": -0.5, "slope high": 0.004, "map": 42.06, "map low": np.nan})
    row["map high"] = np.nan
    assert shown_mean(row, "slope", 2) == "−0.12 (−0.50 to 0.00)"
    assert shown_mean(row, "map") == "42.1 (no interval)"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.1, -0.2, 0.0, 0.3, -0.1), "equivalent"),
        ((5.0, 5.5, 4.6, 5.2, 4.9), "different"),
        ((-5.0, -5.5, -4.6), "different"),
        ((1.0, 3.0, 0.5, 2.5, 1.5), "undecided"),
        ((1.0, 1.2, 0.9, 1.1, 1.0), "equivalent"),  # above zero, but within the margin
        ((3.0, 2.2, 3.8), "undecided"),  # the mean is outside the margin, the interval is not
        ((0.0,), "undecided"),
    ],
)
def test_equivalent_different_or_undecided(differences, verdict):
    rows = [("a", s, 40 + d) for s, d in enumerate(differences)] + [("b", s, 40.0) for s in range(len(differences))]
    results = pd.DataFrame(rows, columns=["method", "seed", "recall@1"]).assign(complete=True)
    (row,) = differences_from(results, "b").to_dict("records")
    assert (row["minus b"], row["n"], row["verdict"]) == (
        pytest.approx(np.mean(differences)),
        len(differences),
        verdict,
    )
    if len(differences) > 1:
        expected = stats.ttest_1samp(differences, 0).confidence_interval()
        assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))


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


@pytest.mark.parametrize("classes", [100, 400])  # test classes of CUB-200-2011 and CUHK03, and of glyphs
def test_intervals_over_classes_cover_95_percent_and_intervals_over_queries_do_not(classes):
    rng = np.random.default_rng(5)
    runs = [run_of(rng, classes) for _ in range(240_000 // classes)]  # standard error at most 0.9 %
    found = [bootstrap_over_classes(*run, rng, resamples=500)[1:] for run in runs]
    assert 0.93 < covered(found, TRUE_MEAN) < 0.97
    means = np.array([hits.mean() for hits, _ in runs])
    half = 1.96 * np.sqrt(means * (1 - means) / [len(hits) for hits, _ in runs])
    assert covered(zip(means - half, means + half, strict=True), TRUE_MEAN) < 0.85
