"""The comparison of datasets of different difficulty: numbers, words, figure, and its place in a report."""

import shutil

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hloss.study import plots, sections
from hloss.study.alt_texts import describe_differences
from hloss.study.difficulty import changes, differences, in_words
from hloss.study.readme import results_section
from tests.helpers.sample import SAMPLE, sample_table

NOISE = np.array([0.4, -0.5, 0.2, 0.1, -0.2])
DATASETS = ("easy", "standard", "hard")


def table_of(leads, length=2000, seeds=5, **settings):
    """Runs of "histogram" and of other methods; leads: method -> lead of the histogram loss on each dataset."""
    means = {"histogram": (60.0, 50.0, 20.0)}
    means |= {
        method: [mean - lead for mean, lead in zip(means["histogram"], of_datasets, strict=True)]
        for method, of_datasets in leads.items()
    }
    rows = [
        {"dataset": dataset, "split": f"{dataset}-{seed}", "comparison": "difficulty", "method": method, "seed": seed,
         "recall@1": mean + NOISE[(seed + i + 2 * j) % 5], "length": length, "run_id": f"{dataset}-{method}-{seed}"}
        for i, (method, of_datasets) in enumerate(means.items())
        for j, (dataset, mean) in enumerate(zip(DATASETS, of_datasets, strict=True))
        for seed in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**{"complete": True, "still_improving": False} | settings)


def by_seed(results, dataset):
    """Recall@1 of the histogram loss minus that of lifted structure for each seed."""
    values = results[results["dataset"] == dataset].pivot(index="seed", columns="method", values="recall@1")
    return (values["histogram"] - values["lifted"]).to_numpy()


def interval(values):
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def test_differences_and_their_change_are_paired_by_seed():
    results = table_of({"lifted": (-3.0, -1.0, 2.0)})
    found = differences(results)
    assert found["dataset"].tolist() == list(DATASETS)
    for row in found.to_dict("records"):
        values = by_seed(results, row["dataset"])
        assert (row["first"], row["other"], row["length"], row["n"], row["runs"]) == (
            "histogram",
            "lifted",
            2000,
            5,
            10,
        )
        assert row["difference"] == pytest.approx(values.mean())
        assert (row["low"], row["high"]) == pytest.approx(interval(values))
        assert row["first (%)"] - row["other (%)"] == pytest.approx(row["difference"])
        assert set(row["run_ids"].split(", ")) == set(results.loc[results["dataset"] == row["dataset"], "run_id"])
    (change,) = changes(results).to_dict("records")
    values = by_seed(results, "hard") - by_seed(results, "easy")
    assert change["dataset"] == "hard minus easy"
    assert (change["difference"], change["low"], change["high"]) == pytest.approx((values.mean(), *interval(values)))


def test_words_say_whether_the_sign_or_the_verdict_depends_on_the_difficulty():
    leads = {
        "a": (-3.0, -3.0, -3.0), "b": (-3.0, -1.5, 2.0), "c": (-3.0, 0.0, -2.0), "d": (0.0, 0.0, 0.0), "e": (1.0, 2, 3)
    }  # fmt: skip
    assert [short for short, _ in in_words(table_of(leads))] == [
        "Histogram is below a on easy, standard and hard.",
        "The sign of histogram minus b depends on the difficulty: negative on easy and standard; positive on hard.",
        "The verdict on histogram minus c depends on the difficulty: negative on easy and hard; undecided on standard.",
        "The order of histogram and d is undecided on easy, standard and hard.",
        "Histogram is above e on easy, standard and hard.",
    ]


def test_numbers_are_those_of_the_longest_length_with_the_change():
    results = table_of({"lifted": (-3.0, -1.0, -3.0)})
    results.loc[results["run_id"] == "hard-lifted-0", "still_improving"] = True
    both = pd.concat([table_of({"lifted": (9.0, 9.0, 9.0)}, length=200), results])
    ((short, text),) = in_words(both)
    assert short == "Histogram is below lifted on easy, standard and hard."
    low, high = (f"{value:+.1f}".replace("-", "−") for value in interval(by_seed(results, "hard")))
    assert text.startswith("Histogram minus lifted after 2,000 iterations, in points (95 % CI): −3.0 (")
    assert f"and −3.0 ({low} to {high}) on hard. The change, hard minus easy: " in text
    assert text.endswith("which can be chance. 1 of 30 runs are still improving.")
    assert differences(both)["length"].tolist() == [200] * 3 + [2000] * 3


def test_a_clear_change_is_not_called_chance():
    ((_, text),) = in_words(table_of({"lifted": (-3.0, -1.0, 2.0)}))
    assert "The change, hard minus easy: +5.0 (" in text
    assert "chance" not in text


def test_one_seed_decides_nothing_and_missing_runs_are_left_out():
    ((short, text),) = in_words(table_of({"lifted": (-3.0, -1.0, 2.0)}, seeds=1))
    assert short == "The order of histogram and lifted is undecided on easy, standard and hard."
    assert text.count("(no interval)") == 4
    results = table_of({"lifted": (-3.0, -1.0, 2.0)})
    results["complete"] = ~results["run_id"].isin([f"hard-lifted-{seed}" for seed in range(5)] + ["easy-lifted-3"])
    found = differences(results)
    assert found[["dataset", "n"]].to_numpy().tolist() == [["easy", 4], ["standard", 5]]
    assert changes(results)["dataset"].tolist() == ["standard minus easy"]
    others = results.assign(comparison="losses")
    assert differences(others).empty
    assert in_words(others) == []


def test_the_figure_has_one_panel_per_method_and_its_description_the_numbers():
    found = differences(table_of({"lifted": (-3.0, -1.0, 2.0), "triplet": (1.0, 1.0, 1.0)}))
    found.loc[found["dataset"] == "hard", "still improving"] = 2
    panels = plots.differences(found).axes
    assert [axes.get_title() for axes in panels] == ["histogram minus lifted", "histogram minus triplet"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list(DATASETS)
    (circles,) = (line for line in panels[0].get_lines() if line.get_markerfacecolor() == "white")
    np.testing.assert_allclose(circles.get_xdata(), found["difference"][2:3])
    described = describe_differences(found)
    assert described.count(" on hard") == 2
    assert "histogram minus lifted −3.0 (" in described


@pytest.fixture
def losses():
    """The runs of the losses in the committed sample, before `read_results`, without their other comparisons."""
    names = ["comparison", "method", "place"]
    table = sample_table().explode(names, ignore_index=True)
    rows = table[table["comparison"].isin(["losses", "tuned losses"]) & (table["dataset"] == "glyphs")]
    return rows.assign(**{name: [[value] for value in rows[name]] for name in names})


@pytest.fixture
def both(losses):
    """These runs, and three of the losses with the comparison "difficulty" on three datasets."""
    chosen = losses[losses["loss"].isin(["histogram", "binomial", "triplet"]) & (losses["seed"] < 5)]
    lengths = chosen.get("length", chosen["iterations"])
    chosen = chosen[lengths == lengths.max()].drop_duplicates(["loss", "seed"])
    added = [
        chosen.assign(
            dataset=name, split=name, comparison=[["difficulty"]] * len(chosen), card_sha256=name,
            method=[[loss] for loss in chosen["loss"]], place=[[1000 + 10 * i + j] for j in range(len(chosen))],
            run_id=[f"{name}-{run_id}" for run_id in chosen["run_id"]],
        )
        for i, name in enumerate(("glyphs-easy", "glyphs-hard"))
    ]  # fmt: skip
    return pd.concat([losses, *added], ignore_index=True)


def report_of(table, folder, monkeypatch):
    """A report of a table, and the list of what it displays."""
    file = folder / "reports/some/results.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(file)
    shown = []
    for module in ("sections", "exhibits"):
        monkeypatch.setattr(f"hloss.study.{module}.display", lambda what, **_: shown.append(what))
    return sections.Report(str(file), ""), shown


def test_other_sections_of_a_report_are_the_same_without_these_runs(losses, both, tmp_path, monkeypatch):
    alone, _ = report_of(losses, tmp_path / "a", monkeypatch)
    report, shown = report_of(both, tmp_path / "b", monkeypatch)
    pd.testing.assert_frame_equal(report.board, alone.board)
    assert list(report.by_dataset) == list(report.losses) == ["glyphs"]
    assert report.name("glyphs", "similarities") == "similarities"
    assert "glyphs-easy" not in report.head().partition('class="answer"')[2]
    report.ablations()
    report.losses_tables()
    assert not any("glyphs-easy" in str(getattr(what, "data", what)) for what in shown)
    report.basis()
    assert "`glyphs-easy`: " in shown[-1].data


def test_the_readme_is_the_same_without_these_runs_up_to_their_own_part(losses, both, tmp_path):
    sections_of = []
    for name, table in {"alone": losses, "both": both}.items():
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "results.parquet")
        shutil.copy(SAMPLE / "claims.csv", tmp_path / name)
        sections_of.append(results_section(tmp_path / name))
    without, of_runs, told = sections_of[1].partition("\n\n**An easier and a harder drawing")
    assert sections_of[0] == without
    assert of_runs
    assert " minus " in told


def test_a_study_of_these_runs_alone_has_a_report_that_answers_by_them(both, tmp_path, monkeypatch):
    alone = both[[names[0] == "difficulty" for names in both["comparison"]]]
    report, _ = report_of(alone, tmp_path, monkeypatch)
    answer = report.head().partition('class="answer"')[2]
    assert all(short in answer and text in answer for short, text in in_words(report.all_lengths))
    assert len(in_words(report.all_lengths)) == 2
    assert report.board["verdict"].tolist() == ["not run"]  # the cost, which needs no dataset


def test_a_report_shows_text_figure_and_table_of_the_difficulty(both, losses, tmp_path, monkeypatch):
    report, shown = report_of(both, tmp_path, monkeypatch)
    report.difficulty()
    title, words, png, caption, table = shown
    assert title.data == "### Difficulty of the data"
    assert words.data.count("- **") == 2
    assert "histogram minus binomial" in png["text/plain"]
    assert f"after {both['iterations'].max():,} iterations" in caption.data
    assert table.data.count("<tr>") == 1 + 2 * 3
    alone, nothing = report_of(losses, tmp_path / "a", monkeypatch)
    alone.difficulty()
    assert nothing == []
