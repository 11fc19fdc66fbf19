"""Alternative texts name the axes, their range, and the best method or level with its numbers."""

import numpy as np
import pandas as pd
import pytest

from hloss.study import alt_texts
from hloss.study.statistics import summary


def runs_of(values, **settings):
    """Runs of one comparison; `values`: method -> (settings, value of each seed)."""
    rows = [
        {"loss": "histogram"} | given | {"method": method, "seed": seed, "recall@1": value}
        for method, (given, of_seeds) in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    frame = pd.DataFrame(rows).assign(dataset="mini", comparison="axis", complete=True, still_improving=False)
    defaults = {"length": 200, "run_id": [f"r{i}" for i in range(len(frame))]}
    return frame.assign(**defaults | settings)


def described(runs):
    return alt_texts.describe_comparison("axis", runs, summary(runs, ["recall@1"]))


def test_categories():
    runs = runs_of({"a": ({}, (10.0, 12.0)), "untrained": ({}, (2.0,)), "without a result": ({}, (np.nan,))})
    runs["complete"] = runs["recall@1"].notna()
    low, high = summary(runs, ["recall@1"]).loc[0, ["recall@1 low", "recall@1 high"]]
    assert described(runs) == (
        "Means and intervals of the test Recall@1 on mini for 2 methods, after 200 iterations: highest for a with "
        f"11.0 % (95 % interval {low:.1f} to {high:.1f}), lowest for untrained with 2.0 %."
    )


def test_a_curve_of_one_seed_has_no_interval():
    runs = runs_of({f"a, n_bins {n:g}": ({"n_bins": n}, (value,)) for n, value in ((25.0, 5), (50.0, 9), (100.0, 7))})
    assert described(runs.assign(length=[800, 400, 200])) == (
        "Curve of the test Recall@1 on mini over bins (intervals of [-1, 1]) from 25 to 100, after 200 to 800 "
        "iterations: highest at 50 with 9.0 %, lowest at 25 with 5.0 %."
    )


def test_curves_name_their_line():
    methods = {f"{loss}, learning_rate {r:g}": ({"loss": loss, "learning_rate": r}, (value,))
               for loss, values in {"a": (1, 2, 3), "b, new": (6, 5, 4)}.items()
               for r, value in zip((0.001, 0.01, 0.1), values, strict=True)}  # fmt: skip
    assert described(runs_of(methods)) == (
        'Curves of the test Recall@1 on mini over initial learning rate of Adam from 0.001 to 0.1 for a and "b, new", '
        "after 200 iterations: highest at 0.001 for b, new with 6.0 %, lowest at 0.001 for a with 1.0 %."
    )


def test_a_map_names_both_settings():
    methods = {f"a, kernel {k}, bandwidth {b:g}": ({"kernel": k, "bandwidth": b}, (value,))
               for k, values in {"x": (1, 2, 3), "y": (6, 5, 4), "z": (7, 7, 7)}.items()
               for b, value in zip((0.5, 2, 20), values, strict=True)}  # fmt: skip
    runs = runs_of({"a": ({"kernel": "w", "bandwidth": np.nan}, (9,)), **methods})
    assert described(runs) == (
        "Map of the test Recall@1 on mini over bandwidth (standard deviation of the kernel in nodes) from 0.5 to 20 "
        "for kernel w, x, y and z, after 200 iterations: highest for kernel w with 9.0 %, lowest at 0.5 for kernel x "
        "with 1.0 %."
    )


def test_methods_without_training_have_no_length():
    assert "iterations" not in described(runs_of({"raw pixels": ({}, (3.0,))}, length=0))


@pytest.fixture
def recalls():
    values = {("a", 0): (10, 30), ("a", 1): (20, 50), ("b", 0): (5, 99)}
    rows = [(m, s, k, v) for (m, s), pair in values.items() for k, v in zip((1, 1000), pair, strict=True)]
    return pd.DataFrame(rows, columns=["method", "seed", "K", "recall"])


def test_recall_curves(recalls):
    text = (
        "Curves of the test Recall@K over K from 1 to 1,000 for 2 methods: highest at K = 1 a (15.0 %); at K = 1,000 b "
        "(99.0 %)"
    )
    assert alt_texts.describe_recall_curves(recalls) == f"{text}."
    published = pd.DataFrame({"method": ["b", "b", "unknown"], "k": 1, "value": 50.0})
    assert alt_texts.describe_recall_curves(recalls, published) == f"{text}; 2 published values as stars."


def test_recall_over_iterations(recalls):
    history = recalls.rename(columns={"K": "iteration"})
    text = "Curves of the validation Recall@1 over training iterations from 1 to 1,000 for 2 methods: highest"
    last = "after 1,000 iterations b (99.0 %)."
    assert alt_texts.describe_recall_over_iterations(history) == f"{text} {last}"
    described = alt_texts.describe_recall_over_iterations(history, [1, 500, 1000])  # no validation after 500
    assert described == f"{text} after 1 iterations a (15.0 %); {last}"


def test_recall_by_length():
    short = runs_of({"a": ({}, (10.0,)), "b": ({}, (9.0,)), "untrained": ({}, (50.0,))})
    short.loc[2, "length"] = 0
    long = runs_of({"a": ({}, (11.0,)), "b": ({}, (12.5,))}, length=2000)
    table = summary(pd.concat([short, long], ignore_index=True), ["recall@1"])
    assert alt_texts.describe_recall_by_length("axis", table) == (
        "Curves of the test Recall@1 on mini over the training length in iterations for 2 methods: highest after 200 "
        "a (10.0 %); after 2,000 b (12.5 %)."
    )
