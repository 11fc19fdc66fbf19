"""Errors in files that people write: each names the file, the setting, its value and what is allowed."""

import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from hloss.runs.errors import ConfigError
from hloss.study.claims import read_claims
from hloss.study.input_files import check_parameters
from hloss.study.plan import MEASURED, read_costs
from hloss.study.profiles import uses_slurm
from hloss.study.published import COLUMNS, read_published
from hloss.study.readme import update_results
from hloss.study.results import read_results
from hloss.study.spec import load_study
from hloss.study.throughput import MEASURED as THROUGHPUT
from hloss.study.throughput import read_throughput
from hloss.study.verified import read_verified
from hloss.study.verify import verify
from tests.helpers.scripts import run_script

STUDY = """title: t
seeds: [0]
runs:
  - name: a
    set: {loss: histogram}
"""
CLAIM = """- name: a
  section: "4"
  claim: c
  criterion: c
  check: above
  data: [cub]
  comparison: [losses]
  method: {loss: histogram}
  rivals: [{loss: lifted}]
"""
VALUE = dict.fromkeys(COLUMNS, "x") | {
    "dataset": "cub", "selection": "not stated", "metric": "map", "value": "50", "dim": "", "settings": "C=10"
}  # fmt: skip


def csv(**changes):
    return "\n".join([",".join(COLUMNS), ",".join((VALUE | changes)[column] for column in COLUMNS)])


READERS = {
    "study": ("s.yaml", STUDY, lambda file: load_study("s", file.parent)),
    "claims": ("claims.yaml", CLAIM, lambda file: read_claims(str(file))),
    "published": ("values.csv", csv(), read_published),
    "profile": ("config.yaml", "executor: slurm\n", lambda file: uses_slurm(file.parent)),
}
LIST = "must be a list"
CASES = [
    # the YAML itself
    ("study", lambda t: "", "s.yaml: the file is empty; copy a committed file"),
    ("study", lambda t: "# nothing\n", "s.yaml: the file is empty"),
    (
        "study",
        lambda t: t.replace("  - name", "\t- name"),
        r"s.yaml, line 4, column 1: .* indent with spaces, not with tabs",
    ),
    ("study", lambda t: "title: [a\n", "s.yaml, line 2, column 1: the YAML is not valid: .* the end of the text"),
    ("study", lambda t: "title: a: b\n", "s.yaml, line 1, column 9: .* put text that contains ': ' in quotes"),
    ("study", lambda t: t + "seeds: [1]\n", "s.yaml, line 6, column 1: .*the key 'seeds' occurs twice; keep one"),
    ("study", lambda t: t.replace("t\n", "2026-13-01\n", 1), "s.yaml: the YAML is not valid: month must be in 1..12"),
    ("study", lambda t: t.replace("t\n", "a\x01\n", 1), "s.yaml: the YAML is not valid: unacceptable character"),
    ("study", lambda t: b"title: \xff\n", "s.yaml: the file is not text in UTF-8: .*; save it as UTF-8"),
    # a study
    ("study", lambda t: "- a\n", r"s.yaml: got \['a'\]; must be a mapping with the settings title, seeds, runs,"),
    ("study", lambda t: t.replace("title: t\n", ""), "s.yaml: title: missing; this setting is required"),
    ("study", lambda t: t.replace("title: t", "title:"), "s.yaml: title: got nothing; must be text$"),
    (
        "study",
        lambda t: t.replace("title: t", "title: 2026-01-02"),
        "title: got 2026-01-02; must be text; put it in quotes",
    ),
    ("study", lambda t: t.replace("title: t", "title: [a]"), r"title: got \['a'\]; must be text$"),
    (
        "study",
        lambda t: t + "seed: 1\n",
        r"seed: unknown setting \(did you mean seeds\?\); allowed are title, seeds, runs,",
    ),
    ("study", lambda t: t.replace("[0]", "3"), f"seeds: got 3; {LIST}"),
    ("study", lambda t: t.replace("[0]", "[]"), rf"seeds: got \[\]; {LIST} of at least one value"),
    ("study", lambda t: t.replace("[0]", "[yes]"), "seeds.0: got true; must be a whole number"),
    ("study", lambda t: t.replace("[0]", "[0.5]"), "seeds.0: got 0.5; must be a whole number"),
    ("study", lambda t: t + "tuning_seed: x\n", "tuning_seed: got 'x'; must be a whole number"),
    ("study", lambda t: t + "fixed: [a]\n", r"fixed: got \['a'\]; must be a mapping"),
    ("study", lambda t: t + "fixed: {yes: 1}\n", "fixed.1: got true; must be text; put it in quotes"),
    ("study", lambda t: t + "resources: 3\n", "resources: got 3; must be a mapping"),
    ("study", lambda t: t + "resources: {gpus: yes}\n", "s.yaml, a: resources.gpus: got true; must be a whole number"),
    ("study", lambda t: "title: t\nseeds: [0]\nruns: {a: 1}\n", rf"runs: got {{'a': 1}}; {LIST}"),
    (
        "study",
        lambda t: "title: t\nseeds: [0]\nruns: [a]\n",
        "s.yaml, run 1: got 'a'; must be a mapping with the settings name",
    ),
    ("study", lambda t: t.replace("name: a", "name: yes"), "run true: name: got true; must be text; put it in quotes"),
    ("study", lambda t: t.replace("{loss: histogram}", "[loss]"), r"run 'a': set: got \['loss'\]; must be a mapping"),
    ("study", lambda t: t + "    cross: {n_bins: 5}\n", f"run 'a': cross.n_bins: got 5; {LIST}"),
    ("study", lambda t: t + "    cross: {n_bins: []}\n", rf"cross.n_bins: got \[\]; {LIST} of at least one value"),
    (
        "study",
        lambda t: t + "    cross: {loss: [lifted]}\n",
        "run 'a': loss must be in set or in cross: got both; remove",
    ),
    ("study", lambda t: t + "    seeds: 1\n", f"run 'a': seeds: got 1; {LIST}"),
    ("study", lambda t: t + "    tune: maybe\n", "run 'a': tune: got 'maybe'; must be true or false"),
    ("study", lambda t: t + "    tune: true\n", "tuning_seed .*: got nothing; add the line `tuning_seed: NUMBER`"),
    ("study", lambda t: t + "    tune: true\ntuning_seed: 9\n", "values of cross: got none; add cross, or remove tune"),
    ("study", lambda t: "title: t\nseeds: [0]\nruns: []\n", rf"s.yaml: runs: got \[\]; {LIST} of at least one value"),
    ("study", lambda t: t + "fixed: {seed: 3}\n", "s.yaml, a: .* cannot have seed: got 3; remove it and list it in `s"),
    ("study", lambda t: t + "    cross: {seed: [3]}\n", "cannot have seed: got 3; remove it and list it in `seeds`"),
    ("study", lambda t: t + "fixed: {study: b}\n", "cannot have study: got 'b'; remove it and rename the study's file"),
    (
        "study",
        lambda t: t + "  - {name: a, set: {loss: histogram, n_bins: 9}}\n",
        "s.yaml: method 'a' of the comparison 'losses' must .*: got n_bins=200 and n_bins=9; give the entries",
    ),
    (
        "study",
        lambda t: t + "  - {name: a, set: {loss: binomial, C: 2.0}}\n",
        "method 'a' of the comparison 'losses' must .*: got loss='histogram' and loss='binomial'; give",
    ),
    ("study", lambda t: "title: t\ninclude: s\n", f"include: got 's'; {LIST}"),
    (
        "study",
        lambda t: "title: t\ninclude: [s]\n",
        "include must not lead back to the same study: got s -> s; remove one",
    ),
    ("study", lambda t: "title: t\ninclude: [nope]\n", "s.yaml: include: study is unknown: got 'nope'; allowed are s$"),
    ("study", lambda t: "title: t\nextends: [a]\nruns: []\n", r"extends: got \['a'\]; must be text$"),
    # claims
    ("claims", lambda t: "", "claims.yaml: the file is empty"),
    ("claims", lambda t: "a: 1\n", r"claims.yaml: got {'a': 1}; must be a list of claims, which begin with `- name:`"),
    ("claims", lambda t: "- a\n", "claims.yaml, claim 1: got 'a'; must be a mapping with the settings name, section"),
    ("claims", lambda t: t + "  margin: two\n", "claim 'a': margin: got 'two'; must be a number"),
    (
        "claims",
        lambda t: t + "  rival: 1\n",
        r"claim 'a': rival: unknown setting \(did you mean rivals\?\); allowed are name",
    ),
    ("claims", lambda t: t.replace("  claim: c\n", ""), "claim 'a': claim: missing"),
    ("claims", lambda t: t.replace("[cub]", "cub"), f"claim 'a': data: got 'cub'; {LIST}"),
    ("claims", lambda t: t.replace('"4"', "4"), "claim 'a': section: got 4; must be text; put it in quotes"),
    ("claims", lambda t: t + "  every_k: 3\n", "claim 'a': every_k: got 3; must be true or false"),
    ("claims", lambda t: t.replace("lifted", "[a").rstrip(), "claims.yaml, line 9, .*: the YAML is not valid"),
    (
        "claims",
        lambda t: t.replace("  rivals: [{loss: lifted}]\n", ""),
        "method and rivals .* only allowed together; add",
    ),
    (
        "claims",
        lambda t: t.replace("{loss: l", "{los: l"),
        r"claim 'a': los is not a setting of a run \(did you mean loss\?\)",
    ),
    (
        "claims",
        lambda t: t.replace("lifted", "liftd"),
        r"claim 'a': loss 'liftd' is unknown; allowed are histogram, .*, none, pml:NAME \(did you mean lifted\?\)",
    ),
    (
        "claims",
        lambda t: t + "  among: {loss: [histogram, binom]}\n",
        r"claim 'a': loss 'binom' is unknown; .* \(did you mean binomial\?\)",
    ),
    (
        "claims",
        lambda t: t + "  axis: n_bin\n",
        r"claim 'a': n_bin is not a setting of a run \(did you mean n_bins\?\)",
    ),
    ("claims", lambda t: t + "  margin: -1\n", "claim 'a': margin: got -1; must be greater than or equal to 0"),
    (
        "claims",
        lambda t: t.replace("above", "best"),
        "claim 'a': check 'best' does not fit a claim with method; allowed are above, equivalent,",
    ),
    (
        "claims",
        lambda t: t[: t.index("  method")] + "  axis: n_bins\n",
        "check 'above' does not fit a claim without method; allowed are equivalent, not_below, no_gain, best,",
    ),
    (
        "claims",
        lambda t: t[: t.index("  method")].replace("above", "best"),
        "claim 'a': check 'best' needs axis and reference; add the missing setting",
    ),
    (
        "claims",
        lambda t: t[: t.index("  method")].replace("above", "budget"),
        "claim 'a': check 'budget' needs method and rivals; add",
    ),
    ("claims", lambda t: t.replace("above", "above_value"), "claim 'a': check 'above_value' needs values; add"),
    ("claims", lambda t: t.replace("[losses]", "[]"), "claim 'a': check 'above' needs comparison; add"),
    ("claims", lambda t: t + t, "claim 'a': name: occurs twice; give each claim its own name"),
    # published values and profiles
    ("published", lambda t: "", "values.csv: the file is not a CSV file in UTF-8: No columns"),
    ("published", lambda t: t + "\n" + "x," * 30, "values.csv: the file is not a CSV file in UTF-8: .*line 3"),
    (
        "published",
        lambda t: csv(settings="C=[1"),
        r"values.csv, line 2: settings='C=\[1', line 1, column 3: the YAML is not",
    ),
    ("profile", lambda t: "", "config.yaml: the file is empty"),
    ("profile", lambda t: "- a\n", r"config.yaml: got \['a'\]; must be a mapping of Snakemake's options"),
]


@pytest.mark.parametrize(("kind", "change", "message"), CASES, ids=range(len(CASES)))
def test_refuses_a_wrong_file_with_setting_value_and_remedy(kind, change, message, tmp_path):
    name, text, read = READERS[kind]
    changed = change(text)
    assert changed != text
    (tmp_path / name).write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path / name)
    assert "Input should be" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("kind", READERS)
def test_reads_the_file_without_the_mistakes(kind, tmp_path):
    name, text, read = READERS[kind]
    (tmp_path / name).write_text(text)
    assert read(tmp_path / name) is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"results.parquet: no such table of results; `make report STUDY=quick` writes it"),
        (b"hello", r"results.parquet: the file is damaged or no Parquet file: .*; `make report STUDY=quick` writes"),
        ({"run_id": ["a"]}, "results.parquet: the file is no table of results: got no column dataset, comparison,"),
    ],
    ids=["missing", "damaged", "other table"],
)
def test_refuses_a_file_that_is_no_table_of_results(content, message, tmp_path):
    file = tmp_path / "quick" / "results.parquet"
    file.parent.mkdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        pd.DataFrame(content).to_parquet(file)
    for read in (read_results, verify):
        with pytest.raises(ConfigError, match=message):
            read(file)


@pytest.mark.parametrize("read", [read_costs, read_throughput])
def test_refuses_a_table_of_costs_with_other_columns(read, tmp_path):
    (tmp_path / "costs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"costs.csv has wrong columns: got a, b; required are (dataset|card),"):
        read(tmp_path / "costs.csv")


@pytest.mark.parametrize(
    ("read", "table", "column"),
    [(read_costs, MEASURED, "memory_mib"), (read_throughput, THROUGHPUT, "steps_per_second")],
)
@pytest.mark.parametrize("value", ["", "much", "nan"])
def test_refuses_a_cost_that_is_no_number(read, table, column, value, tmp_path):
    costs = pd.read_csv(table, dtype=str, keep_default_na=False)
    costs.loc[1, column] = value
    costs.to_csv(tmp_path / "costs.csv", index=False)
    with pytest.raises(ConfigError, match=f"costs.csv, line 3: {column}: got '{value}'; must be a number"):
        read(tmp_path / "costs.csv")


def test_refuses_to_verify_no_run():
    with pytest.raises(ConfigError, match="number of runs to repeat must be at least 1: got 0"):
        verify(Path("reports/sample/results.parquet"), n=0)


def test_refuses_a_seed_that_numpy_refuses():
    with pytest.raises(ConfigError, match=r"the seed of the draw must be from 0 to 2\^32 - 1: got -1"):
        verify(Path("reports/sample/results.parquet"), seed=-1)


def test_refuses_a_missing_part_with_the_study_that_writes_it(tmp_path):
    with pytest.raises(ConfigError, match=r"one.parquet: no such table of results; `make study STUDY=one` writes"):
        verify(tmp_path / "sample" / "parts" / "one.parquet")


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_refuses_a_damaged_file_of_verified_runs(text, tmp_path):
    (tmp_path / "verified.json").write_text(text)
    with pytest.raises(ConfigError, match=r"verified.json: the file is damaged; delete it, and write it again with"):
        read_verified(tmp_path / "results.parquet")


def test_names_the_root_folder_where_there_are_no_studies(tmp_path):
    with pytest.raises(ConfigError, match="has no study: run the command in the root folder of the project"):
        load_study("quick", tmp_path)
    with pytest.raises(ConfigError, match=r"README.md: no such file; run the command in the root folder"):
        update_results(tmp_path, Path("reports/sample"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run_notebook.py", "run", "quick"], "run needs the id of a run: got none; `make plan`"),
        (
            ["run_notebook.py", "run", "quick", "abc"],
            "study quick: the study has no run with the id 'abc': got 11",
        ),
        (["plan_study.py", "workflow/studies/quick.yaml"], r"study is unknown: .* \(did you mean quick\?\)"),
        (["run_notebook.py", "report", "nope"], "study nope: study is unknown: got 'nope'; allowed are cub"),
        (["run_study.py", "quick", "--cores", "0"], r"CORES \(--cores\) must be at least 1: got 0"),
        (["plan_study.py", "quick", "--cores", "-1"], r"CORES \(--cores\) must be at least 1: got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_scripts_refuse_wrong_arguments_without_a_traceback(arguments, message):
    done = run_script(*arguments)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["claims", "published", "profile"])
def test_refuses_a_missing_file(kind, tmp_path):
    name, _, read = READERS[kind]
    with pytest.raises(ConfigError, match=f"{name}: the file cannot be read: No such file"):
        read(tmp_path / name)


def test_studies_that_include_each_other_are_refused(tmp_path):
    Path(tmp_path / "a.yaml").write_text("title: t\ninclude: [b]\n")
    Path(tmp_path / "b.yaml").write_text("title: t\ninclude: [a]\n")
    with pytest.raises(ConfigError, match=r"b.yaml: include must not lead back .*: got a -> b -> a"):
        load_study("a", tmp_path)


@pytest.mark.parametrize(("written", "value"), [("1e-3", 0.001), ("1E-3", 0.001), ("2.5e-2", 0.025), ("1", 1.0)])
def test_numbers_with_an_exponent_need_no_decimal_point(written, value, tmp_path):
    (tmp_path / "s.yaml").write_text(STUDY.replace("histogram}", f"histogram, learning_rate: {written}}}"))
    (run,) = load_study("s", tmp_path).runs
    assert run.config.learning_rate == value


def test_refuses_parameters_that_the_notebook_does_not_have(monkeypatch):
    cells = ["", "import json", 'dataset: str = "glyphs"\nlength = None  # int | None', "", "dataset"]
    shell = SimpleNamespace(user_ns={"In": cells})
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    check_parameters()
    cells[3] = '# Parameters\ndataset = "cub"\nlength = 200\n'
    check_parameters()
    cells[3] = "# Parameters\ndatset = 'cub'\nlenght = 1\n"
    told = (
        r"^datset: unknown parameter \(did you mean dataset\?\); lenght: unknown parameter \(did you mean length\?\);"
    )
    with pytest.raises(ConfigError, match=told + " the parameters of this notebook are dataset, length$"):
        check_parameters()
