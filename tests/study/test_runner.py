"""Starts of a study: refusals, repeated runs, and the printed results."""

import re

import pandas as pd
import pytest

from hloss.runs.checkpoints import write_status
from hloss.runs.config import parse_config
from hloss.runs.errors import ConfigError, LockedError
from hloss.runs.run import run
from hloss.study import runner
from hloss.study.profiles import profile_folder, uses_slurm
from hloss.study.progress import Progress
from hloss.study.runner import available_gpus, print_headline, project_lock, run_study, set_aside_stale
from hloss.study.spec import load_study
from tests.helpers.studies import study_of


def test_refuses_an_unknown_profile():
    assert [uses_slurm(profile_folder(name)) for name in ("local", "slurm")] == [False, True]
    with pytest.raises(ConfigError, match="PROFILE is unknown: got 'slrum'; allowed are local, slurm"):
        profile_folder("slrum")


def test_refuses_slurm_without_its_package(monkeypatch):
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    message = r"PROFILE=slurm needs the package snakemake-executor-plugin-slurm, .*pip install 'hloss\[slurm\]'"
    with pytest.raises(ConfigError, match=message):
        run_study(load_study("quick"), "slurm", cores=1, keep=False)


@pytest.mark.parametrize(
    ("snakefile", "words"),
    [
        ("import os\nraise OSError('the home cannot be written')\n", "the home cannot be written"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", "signal 9 ended Snakemake .*too little memory"),
    ],
)
def test_says_why_snakemake_fails(snakefile, words, config, monkeypatch, tmp_path, capfd):
    for folder in ("workflow", "profile", "runs"):
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "workflow" / "Snakefile").write_text(snakefile)
    (tmp_path / "profile" / "config.yaml").write_text("keep-going: true")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"study some is not complete; .*runs/engine\.log"):
        runner._complete("all", study_of(config), tmp_path / "profile", 1, False, None)
    assert re.search(words, capfd.readouterr().out, re.S)


def test_one_study_runs_at_a_time(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    message = "another process is running a study in this folder"
    with project_lock():
        with pytest.raises(LockedError, match=f"{message}; wait until it ends, or end it"), project_lock(0.1):
            pass
        assert capsys.readouterr().out == f"{message}; waiting for at most 0 s\n"
    with project_lock(0.0):
        pass


@pytest.mark.parametrize("offered", [0, 1, 2])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_refuses_a_run_that_needs_more_gpus(config, monkeypatch, offered, device):
    monkeypatch.setattr(runner, "visible_devices", lambda: ["0", "1"][:offered])
    study = study_of(parse_config(config.model_dump() | {"device": device, "devices": 2}), gpus=2)
    if offered == 2 or (offered == 0 and device == "auto"):  # without any GPU it runs on the CPU
        assert available_gpus(study) == offered
    else:
        with pytest.raises(ConfigError, match=f"method 0, seed 0 needs 2 GPUs: got {offered} on this machine; lower"):
            available_gpus(study)


def test_sets_aside_stale_results_and_their_choices(study, monkeypatch):
    study.tune()
    loaded = study.load()
    monkeypatch.setattr(runner, "load_study", lambda name: study.load())
    for r in loaded.runs:
        run(r.config, lambda line: None)
    grid = [r.config.folder for r in loaded.runs[:2]]
    assert set_aside_stale(loaded, keep=False).waiting == ()
    monkeypatch.setattr("hloss.runs.provenance.code_sha256", lambda: "other")
    assert set_aside_stale(loaded, keep=True).waiting == ()
    assert all((folder / "result.json").exists() for folder in grid)
    assert len(set_aside_stale(loaded, keep=False).waiting) == 2
    assert [sorted(file.name for file in folder.glob("result.*")) for folder in grid] == [["result.previous.json"]] * 2


def test_headline_equals_the_report(config, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "reports" / "some"
    folder.mkdir(parents=True)
    rows = [
        ("losses", "histogram", 200, 2, 3, 2),
        ("losses", "histogram", 600, 2, 3, 1),
        ("losses", "triplet", 600, 0, 3, 0),
        ("bins", "n_bins 50", 600, 3, 3, 0),
    ]
    columns = ["comparison", "method", "length", "n", "of", "still improving"]
    table = pd.DataFrame(rows, columns=columns).assign(dataset="tiny")
    recall = {"recall@1": 41.26, "recall@1 low": 40.0, "recall@1 high": 42.52}
    table.assign(**recall).to_csv(folder / "summary.csv", index=False)
    pd.DataFrame({"verdict": ["reproduced", "not run", "reproduced"]}).to_csv(folder / "claims.csv", index=False)
    print_headline(study_of(config))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert " ".join(lines[1]) == "tiny losses histogram 600 2 of 3 41.3 40.0 to 42.5 1 of 2"
    assert [line[0] for line in lines] == ["dataset", "tiny", "claims", "reports/some/report.html"]


def test_prints_the_errors_of_the_engine_unless_a_run_of_this_start_has_said_why(config, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir(exist_ok=True)
    runner.ENGINE_LOG.write_text("\n".join([*map(str, range(40)), "", "PermissionError: '/home/none'", ""]))
    config.folder.mkdir(parents=True)
    write_status(config.folder, "failed", 0, "ConfigError: of an earlier start")
    progress = Progress(study_of(config))
    progress()
    runner.print_engine_errors(1, progress)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "Snakemake failed; the end of runs/engine.log:"
    assert lines == [*map(str, range(26, 40)), "PermissionError: '/home/none'"]
    write_status(config.folder, "failed", 0, "ConfigError: wrong")
    progress()
    capsys.readouterr()
    runner.print_engine_errors(1, progress)
    assert capsys.readouterr().out == ""
