"""Command line of runs: execute one run, list and delete the networks of a study."""

import json
import subprocess
import sys

import pytest

from hloss.runs.__main__ import main
from hloss.runs.config import parse_config
from hloss.runs.run import run


def quiet(line):
    pass


def test_command_executes_a_run_or_prints_the_error(settings, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**settings, "dataset": "tinny"}))
    command = [sys.executable, "-m", "hloss.runs", str(file)]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "dataset 'tinny' is not prepared" in refused.stderr
    file.write_text(json.dumps(settings))
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    file = parse_config(settings).folder / "result.json"
    assert answer.stdout.splitlines()[-1] == str(file)
    result, expected = json.loads(file.read_text()), run(parse_config({**settings, "runs_dir": str(tmp_path)}), quiet)
    for key in ("network_sha256", "metrics", "chosen", "validation_recall@1", "similarity_density", "panel"):
        assert result[key] == expected[key]


def test_refuses_a_missing_settings_file(tmp_path):
    for file, reason in ((tmp_path / "nowhere.json", "No such file or directory"), (tmp_path, "Is a directory")):
        told = rf"hloss\.runs: CONFIG\.json={file}: the file cannot be read: {reason}; give a JSON file"
        with pytest.raises(SystemExit, match=told):
            main([str(file)])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"loss": ', r"hloss\.runs: .*settings\.json is not a JSON file: Expecting value"),
        ('["loss"]', r"settings\.json must contain a mapping such as .*: got \['loss'\]"),
    ],
)
def test_refuses_a_settings_file_without_a_mapping(tmp_path, content, match):
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(SystemExit, match=match):
        main([str(file)])


def test_lists_and_deletes_the_networks_of_a_study(settings, capsys):
    short = {**settings, "iterations": 4}
    kept = [parse_config({**short, "seed": seed}) for seed in (0, 1)]
    kept.append(parse_config({**short, "loss": "none", "network": "pixels", "iterations": 0}))
    without = parse_config({**short, "seed": 2, "keep_network": False})
    for config in (*kept, without):
        run(config, quiet)
    sizes = {config.run_id: (config.folder / "network.pt").stat().st_size for config in kept}
    list_networks = ["networks", "notebook", "--runs-dir", settings["runs_dir"]]
    main(list_networks)
    *lines, total = capsys.readouterr().out.splitlines()
    expected = {c.run_id: [c.loss, c.network, "seed", str(c.seed), f"{sizes[c.run_id] / 2**20:.1f}"] for c in kept}
    assert {line.split()[0]: line.split()[1:-1] for line in lines} == expected
    assert total == f"3 networks, {sum(sizes.values()) / 2**20:.1f} MiB"
    main([*list_networks, "--delete"])
    assert capsys.readouterr().out.splitlines() == [*lines, f"{total}, deleted"]
    assert not list(kept[0].folder.parent.glob("*/network.pt"))
    assert all((config.folder / "result.json").exists() for config in kept)
    main(list_networks)
    assert capsys.readouterr().out == "0 networks, 0.0 MiB\n"


def test_refuses_a_missing_study(tmp_path):
    with pytest.raises(SystemExit, match=r"hloss\.runs: study 'quikc' does not exist: .* has no folder of this name"):
        main(["networks", "quikc", "--runs-dir", str(tmp_path)])


@pytest.mark.parametrize("name", ["..", "../quick", "runs/quick", ""])
def test_refuses_a_path_as_the_name_of_a_study(name, capsys):
    with pytest.raises(SystemExit):
        main(["networks", name])
    assert f"STUDY must be the name of a folder in runs: got {name!r}" in capsys.readouterr().err
