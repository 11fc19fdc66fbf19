"""The results in the README and docs/results.md equal the committed sample, and a change of either is noticed."""

import re
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from scipy import stats

from hloss.runs.errors import ConfigError
from hloss.study.claims import conclusions, read_board
from hloss.study.readme import BEGIN, END, results_page, results_section, typeset, update_results, with_section
from tests.helpers.sample import ROOT, SAMPLE, copy_results, number, sample_rows, sample_table


@pytest.fixture(scope="module")
def section():
    return results_section(SAMPLE)


@pytest.fixture(scope="module")
def page():
    return results_page(SAMPLE)


@pytest.fixture
def board():
    return read_board(SAMPLE / "claims.csv")


def test_when_to_use_this_loss_is_the_text_of_notebook_45():
    cells = nbformat.read(ROOT / "notebooks/45_gradient_support.ipynb", 4).cells
    (text,) = (cell.source for cell in cells if cell.source.startswith("## When to use this loss"))
    assert f"\n\n{text}\n\n## " in (ROOT / "README.md").read_text()


def test_results_are_up_to_date():
    assert update_results(ROOT, SAMPLE, check=True) == [], "run workflow/scripts/write_readme_results.py"


def test_each_verdict_is_in_one_line_of_its_group(section, board):
    words = " ".join(section.split())
    groups = dict(re.findall(r"\*\*([A-Z][a-z ]+): [^*]*\*\*(.*?)(?=\*\*|$)", words))
    several = (board[board["verdict"] != "not run"].groupby(["claim", "dataset", "comparison"]).size() > 1).any()
    every, never = (" at every length", " at any length") if several else ("", "")
    titles = {"reproduced": "Reproduced" + every, "not reproduced": "Not reproduced" + never,
              "inconclusive": "Inconclusive" + every}  # fmt: skip
    assert [title.split(" at ")[0] for title in groups] == [
        "Reproduced", "Not reproduced", "Depends on the training length", "Inconclusive"]  # fmt: skip
    expected = set()
    for _, rows in board[board["verdict"] != "not run"].groupby(["claim", "dataset", "comparison"]):
        row, is_same = rows.iloc[-1], rows["verdict"].nunique() == 1
        title, text = titles[row["verdict"]] if is_same else list(groups)[2], row["text"].removesuffix(".")
        expected.add((title, text))
        (line,) = (line for line in groups[title].split("- *") if line.startswith((f"{text}*: ", f"{text}*. ")))
        if row["low"] == row["low"]:
            difference, low, high = (number(row[name], plus=True) for name in ("difference", "low", "high"))
            assert f"{difference} {row['unit']} ({row['confidence']:.3g} % CI {low} to {high})" in line
        assert row["needed"] in line
        assert f"; Holm: {row['holm']}" in line or row["holm"] == row["verdict"]
        assert is_same or all(f"{verdict} after " in line for verdict in rows["verdict"])
    assert sum(group.count("- *") for group in groups.values()) == len(expected)


def test_table_has_every_verdict_and_its_decisive_difference(page, board):
    table = {row[1].strip(): row[2:4] for row in (line.split("|") for line in page.splitlines()) if len(row) == 5}
    last = board.groupby(["claim", "dataset", "comparison"], sort=False).tail(1)
    judged = last[last["verdict"] != "not run"]
    assert table.keys() - {"claim of the paper", "---"} == {text.removesuffix(".") for text in judged["text"]}
    for text, verdicts in judged.groupby("text"):
        tuned = verdicts["comparison"] == "tuned losses"
        for cell, rows in zip(table[text.removesuffix(".")], (verdicts[~tuned], verdicts[tuned]), strict=True):
            lines = [line.strip() for line in cell.split("<br>") if line.strip()]
            assert len(lines) == len(rows)
            for line, row in zip(lines, rows.itertuples(), strict=True):
                assert f"{row.conclusion}: " in line
                if row.claim == "little tuning":  # both parts can decide it
                    ours, other = re.findall(r": -(\d+\.\d) \(", row.evidence)
                    assert f": histogram −{ours} points and binomial deviance −{other} points. " in line
                else:
                    assert typeset(row.decisive) in line
                assert row.verdict in line
            assert cell.count("; Holm: ") == (rows["holm"] != rows["verdict"]).sum()
    assert "-0." not in page


def test_differences_have_minus_signs_and_units():
    evidence = "batch_size 32: n_bins 25 minus 200: -1.7 (90 % CI -2.9 to -0.4, n = 5)"
    assert typeset(evidence) == "batch_size 32: n_bins 25 minus 200: −1.7 points (90 % CI −2.9 to −0.4, n = 5)"
    assert typeset("histogram minus semi-hard triplet: +0.3 (95 % CI -1.0 to +1.6, n = 5, equivalent)") == (
        "histogram minus semi-hard triplet: +0.3 points (95 % CI −1.0 to +1.6, n = 5, equivalent)"
    )
    assert typeset("exponent 1.84") == "exponent 1.84"


def test_means_equal_those_of_scipy(section):
    table = sample_rows()
    losses = table[table["comparison"].isin(["losses", "tuned losses"])]
    lengths = sorted(set(losses["length"]) - {0})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[0:1] == "|"]
    assert rows[0] == ["loss", "settings", *(f"after {length:,} iterations" for length in lengths)]
    shown = {(settings.split()[0], loss): cells for loss, settings, *cells in rows[2:]}
    of_methods = losses.groupby(["comparison", "method"])
    assert len(shown) == len(rows) - 2 == len(of_methods)
    for (comparison, method), runs in of_methods:
        cells = shown[{"losses": "fixed", "tuned losses": "tuned"}[comparison], method]
        for length, cell in zip(lengths, cells, strict=True):
            recalls = 100 * runs.loc[runs["length"].isin([0, length]), "recall@1"].to_numpy()
            if len(recalls) > 1:
                low, high = stats.t.interval(0.95, len(recalls) - 1, recalls.mean(), stats.sem(recalls))
                assert cell == f"{recalls.mean():.1f} ({low:.1f} to {high:.1f})"
    tuned = [float(cells[-1].split()[0]) for (settings, _), cells in shown.items() if settings == "tuned"]
    assert len(tuned) == 7
    assert tuned == sorted(tuned, reverse=True)


def test_no_sentence_is_longer_than_two_lines():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    blocks = re.split(r"\n\s*\n|\n(?=- )", re.sub(r"(?m)^(\||#).*$", "", text))
    sentences = [
        part for block in blocks for part in re.split(r"(?<=[.:!?])\s+(?=[A-Z0-9*`\[])", " ".join(block.split()))
    ]
    assert len(sentences) > 80
    assert [sentence for sentence in sentences if len(sentence) > 240] == []


def test_limits_count_the_runs_that_still_improve(section):
    table = sample_rows()
    rows = table[(table["iterations"] > 0) & (table["comparison"] != "difficulty")]
    trained = rows.sort_values("length").drop_duplicates("run_id", keep="last")
    validations = zip(trained["history_iteration"], trained["history_recall"], trained["length"], strict=True)
    improving = sum(times[np.argmax(recalls)] > 0.9 * length for times, recalls, length in validations)
    iterations, runs = max(trained["iterations"].value_counts().items(), key=lambda counted: counted[1])
    words = " ".join(section.split())
    assert f"{improving} of the {len(trained)} runs are still improving: their best validation" in words
    assert f"{iterations:,} iterations in {runs} of {len(trained)} trained runs" in words


def test_limits_name_the_smallest_and_the_largest_late_gain(section):
    table = sample_rows()
    losses = table[table["comparison"].isin(["losses", "tuned losses"]) & (table["iterations"] > 0)]
    of_methods = {}
    for (comparison, method, _), runs in losses.groupby(["comparison", "method", "seed"]):
        last = runs.loc[runs["length"].idxmax()]
        recalls = np.maximum.accumulate(last["history_recall"])
        half = np.asarray(last["history_iteration"]) <= last["length"] / 2
        name = f"{method}, {'tuned' if comparison == 'tuned losses' else 'fixed'}"
        of_methods.setdefault(name, []).append(100 * (recalls[-1] - recalls[half][-1]))
    low, high = min((np.mean(v), m) for m, v in of_methods.items()), max((np.mean(v), m) for m, v in of_methods.items())
    words = " ".join(section.split())
    assert f"rises by {low[0]:.1f} points ({low[1]}) to {high[0]:.1f} points ({high[1]}), mean over seeds." in words


def test_the_differences_on_each_drawing_are_given(section):
    table = sample_table().explode(["comparison", "method"])
    runs = table[(table["comparison"] == "difficulty") & (table["length"] == 2000)].assign(
        recall=lambda t: 100 * t["recall@1"]
    )
    recalls = runs.pivot(index=["dataset", "seed"], columns="method", values="recall")
    histogram = recalls.pop("histogram")
    told = " ".join(section.partition("**An easier and a harder drawing")[2].split())
    assert len(recalls.columns) == 2
    for other in recalls:
        for dataset, differences in (histogram - recalls[other]).groupby("dataset"):
            mean = f"{differences.mean():+.1f}".replace("-", "−")
            line = told.partition(f"Histogram minus {other} after 2,000 iterations")[2].partition("The change")[0]
            assert re.search(rf"{re.escape(mean)} \([^)]*\) on {dataset}\b(?!-)", line)


def test_fixed_and_tuned_settings_are_explained(section):
    table = sample_rows()
    fixed = table[(table["comparison"] == "losses") & (table["iterations"] > 0)]
    words = " ".join(section.split())
    assert f"Fixed: a learning rate of {fixed['learning_rate'].unique().item():g} for all losses" in words
    grids = table[table["comparison"] == "tuned losses: choice"].groupby("loss")["run_id"].nunique()
    assert f"from a grid of {grids.unique().item()} runs per loss" in words


@pytest.fixture
def copied_sample(tmp_path):
    folder = tmp_path / "sample"
    copy_results(folder)
    return folder


@pytest.fixture
def copied_root(tmp_path):
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    for name in ("README.md", "docs/results.md"):
        shutil.copy(ROOT / name, root / name)
    return root


def test_another_difference_makes_both_files_out_of_date(copied_root, copied_sample, board):
    last = conclusions(board)
    changed = last[last["low"].notna()].index[0]
    board.loc[changed, "difference"] = 99.9
    board.loc[changed, "decisive"] = re.sub(r": [-+]\S+ \(", ": +99.9 (", board.loc[changed, "decisive"])
    board.to_csv(copied_sample / "claims.csv", index=False)
    assert update_results(copied_root, copied_sample, check=True) == ["README.md", "docs/results.md"]
    assert (copied_root / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert update_results(copied_root, copied_sample) == ["README.md", "docs/results.md"]
    assert update_results(copied_root, copied_sample, check=True) == []
    for name in ("README.md", "docs/results.md"):
        assert " ".join((copied_root / name).read_text().split()).count("+99.9 points") == 1


def test_a_missing_page_is_written(copied_root):
    (copied_root / "docs" / "results.md").unlink()
    assert update_results(copied_root, SAMPLE) == ["docs/results.md"]
    assert (copied_root / "docs" / "results.md").read_text() == results_page(SAMPLE)


def test_keeps_the_text_around_the_section():
    assert with_section(f"before\n{BEGIN}\nold\n{END}\nafter\n", "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["none", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_refuses_a_readme_without_its_two_markers(text):
    with pytest.raises(ConfigError, match="must contain the markers once each"):
        with_section(text, "new")


def test_refuses_results_of_other_data(tmp_path):
    file = tmp_path / "results.parquet"
    table = sample_table()
    table[table["dataset"] == "glyphs"].assign(dataset="cub").to_parquet(file)
    with pytest.raises(ConfigError, match=rf"{re.escape(str(file))}: got results on cub; allowed is glyphs"):
        results_section(tmp_path)


def test_command_checks_both_files():
    command = [sys.executable, "workflow/scripts/write_readme_results.py", "--check"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")
