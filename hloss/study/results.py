"""Collect the results of a study into one table, read the table, and find stale runs."""

import functools
import json
import math
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from hloss.losses.histogram import histogram_loss, reverse_probability
from hloss.runs.config import RunConfig
from hloss.runs.datasets import Dataset, open_dataset
from hloss.runs.errors import ConfigError, DatasetError
from hloss.runs.evaluation import identified_rows
from hloss.runs.files import atomic_write, non_finite, read_result, reading_of_run
from hloss.runs.provenance import NAMED_PACKAGES, fingerprint
from hloss.study.estimates import paired_difference
from hloss.study.input_files import read_table, write_table
from hloss.study.parts import merged_parts, parts_of, write_part
from hloss.study.spec import CHOICE, EXTENDED, INITIAL, LOSS_COMPARISONS, OF_TUNING, Study, StudyRun, short_value
from hloss.study.statistics import bootstrap_over_classes

OF_QUERIES = ("ranks", "query_classes")  # columns with one value per query
SAME_IN_ALL_RUNS = ("protocol", "card_sha256", "prepared")  # within a dataset; card_sha256 within a split
MADE_BY = ("git_commit", "code_sha256", "card_sha256", "torch", *NAMED_PACKAGES, "device", "processor", "threads")
SAME_IN_TRAINED_RUNS = ("network", "weights", "embedding_dim", "chosen_how", "trained_on")  # within a dataset
SAME_SETTINGS = ("network", "weights", "embedding_dim", "choose", "refit")  # the settings that decide these


def stale_runs(study: Study, cards: dict[str, str]) -> list[StudyRun]:
    """Runs with a result whose fingerprint differs from that of a new run.

    Args:
        study: with its tuning resolved.
        cards: dataset -> hash of its card; the card of a dataset that is missing here is not compared.

    Returns:
        The stale runs in the order of the study.
    """
    stale = []
    for run in study.runs:
        if result := read_result(run.config.folder):
            made_by = result["fingerprint"]
            known_card = cards.get(run.config.dataset, made_by["card_sha256"])
            if made_by != fingerprint(run.config, known_card):
                stale.append(run)
    return stale


def card_hashes(study: Study, skip_missing: bool = False) -> dict[str, str]:
    """Hashes of the cards of a study's datasets.

    Args:
        study: with its tuning resolved.
        skip_missing: leave out datasets that are not prepared.

    Returns:
        Dataset -> hash of its card.

    Raises:
        DatasetError: if a dataset is not prepared, unless `skip_missing`.
    """
    hashes = {}
    for folder in {run.config.data_folder for run in study.runs}:
        with suppress(DatasetError) if skip_missing else nullcontext():
            hashes[folder.name] = open_dataset(folder).card_sha256
    return hashes


def write_results(study: Study, keep: bool) -> None:
    """Write results.parquet (`collect`) and loss_cost.csv (`measured_loss_cost`) to reports/STUDY.

    Also pairs.parquet (`pair_records`) if a run recorded its pairs, and the part of a study with `part_of`. If
    reports/STUDY has parts, results.parquet is their merged table.

    Args:
        study: with its tuning resolved.
        keep: as in `collect`.

    Raises:
        ConfigError: as in `collect`.
    """
    file = Path("reports") / study.name / "results.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    table, cost = merged_parts(file) if parts_of(file) else collect(study, keep), measured_loss_cost()
    if study.part_of:
        write_part(study.name, study.part_of, table)
    if len(pairs := pair_records(study)):
        write_table(pairs, file.with_name("pairs.parquet"))
    atomic_write(file.with_name("loss_cost.csv"), lambda part: cost.to_csv(part, index=False))
    write_table(table, file)


def measured_loss_cost() -> pd.DataFrame:
    """Measure the time of the histogram loss, forward and backward, on this machine's CPU.

    Returns:
        One row per batch size. Columns: batch_size, seconds (the fastest of three calls, 128 dimensions).
    """
    rows = []
    for n in (1024, 2048, 4096, 8192):
        embeddings = torch.randn(n, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            histogram_loss(embeddings, torch.arange(n) // 8).backward()
            seconds.append(time.perf_counter() - start)
        rows.append({"batch_size": n, "seconds": min(seconds)})
    return pd.DataFrame(rows)


def collect(study: Study, keep: bool = False) -> pd.DataFrame:
    """Collect the results of a study.

    Args:
        study: with its tuning resolved.
        keep: accept results of several versions of the code or of a package.

    Returns:
        One row per run and length; `complete` is False for a run without a result. Columns: those of the study (study,
        title, comparison, method, place, settings of the run, length), of the result (metrics as fractions) and of its
        provenance.

    Raises:
        ConfigError: if there is no result; if several versions of the code or of a package that settings name made the
            results, unless `keep`; or if results cannot be compared (`refuse_mixed`).
    """
    rows, first = [], {run.dataset: run.config.seed for run in sorted(study.runs, key=lambda r: -r.config.seed)}
    opened = functools.cache(open_dataset)
    for run in study.runs:
        of_lengths: list[dict[str, Any]] = [{"complete": False} for _ in run.config.lengths]
        if result := read_result(run.config.folder):
            dataset = opened(run.config.data_folder)
            exact = run.config.seed == first[run.dataset] and bool(set(LOSS_COMPARISONS) & set(run.methods))
            of_lengths = result_rows(run.config, result, dataset, exact)
            if all(name.endswith(CHOICE) for name in run.methods):  # no claim compares the queries of a grid's runs
                of_lengths = [{k: v for k, v in row.items() if k not in OF_QUERIES} for row in of_lengths]
        rows += [a | b for a, b in zip(_study_rows(study, run), of_lengths, strict=True)]
    rows += [row | {"run_id": "", "complete": False} for run in study.waiting for row in _study_rows(study, run)]
    rows = [row for row in rows if row["comparison"]]
    table = pd.DataFrame(rows)
    if not table["complete"].any():
        raise ConfigError(f"study {study.name!r} has no result; run `make study STUDY={study.name}` first")
    if not keep:
        _refuse_versions(study.name, table)
    refuse_mixed(table)
    return table


def pair_records(study: Study) -> pd.DataFrame:
    """Collect the records of pairs of a study's complete runs with `record_pairs`.

    Args:
        study: with its tuning resolved.

    Returns:
        One row per run, comparison and validation; grids of tuning are left out. Columns: dataset, comparison, method,
        seed, run_id, and those of the run's history.parquet: iteration, loss, validation_recall@1 (fraction) and the
        values of `hloss.runs.evaluation.pair_record`. Measured values are float32: with float64 the file is almost
        twice as large. Empty without a record.
    """
    tables = []
    for run in study.runs:
        methods = {name: method for name, method in run.methods.items() if not name.endswith(OF_TUNING)}
        if methods and (run.config.folder / "result.json").exists():
            history = read_history(run.config.folder)
            if "validation_overlap" in history:
                recorded = history[history["validation_overlap"].notna()]
                of_run = recorded.assign(dataset=run.dataset, seed=run.config.seed, run_id=run.config.run_id)
                tables += [of_run.assign(comparison=name, method=method) for name, method in methods.items()]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    first = [name for name in ("dataset", "comparison", "method", "seed", "run_id") if name in table]
    measured = table.select_dtypes("float64").columns
    return table[first + [name for name in table if name not in first]].astype(dict.fromkeys(measured, np.float32))


def _refuse_versions(study: str, table: pd.DataFrame) -> None:
    """Refuse results of several versions of the code, or of a package that settings name."""
    for column in ("code_sha256", *NAMED_PACKAGES):
        if column in table and (versions := table[column].nunique()) > 1:
            what = "the code" if column == "code_sha256" else column
            raise ConfigError(
                f"the runs of study {study!r} were made by {versions} versions of {what}; run the study again, or "
                "accept this with KEEP=1"
            )


def _study_rows(study: Study, run: StudyRun) -> list[dict[str, Any]]:
    """The columns of a run that follow from the study, at each length; `report_at` is in the lengths of the rows."""
    settings = {name: value for name, value in run.config.resolved().items() if name != "report_at"}
    rows = []
    for length in run.config.lengths:
        methods = {name: method for name, method in run.methods.items() if length in run.lengths_in(name)}
        row = {
            "study": run.config.study,
            "title": study.title,
            "comparison": list(methods),
            "method": list(methods.values()),
            "place": [study.order[run.dataset, *pair] for pair in methods.items()],
            "run_id": run.config.run_id,
            **settings,
            "dataset": run.dataset,
            "split": run.config.dataset,
            "length": length,
        }
        rows.append(row)
    return rows


def reported(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a run at each of its lengths.

    Args:
        result: content of a result.json; older ones have one length.

    Returns:
        The entries of `lengths`, the shortest first.
    """
    if "lengths" in result:
        return result["lengths"]
    iterations, chosen = result["config"]["iterations"], result["chosen"]["iteration"]
    entry = {"iterations": iterations, "chosen_iteration": chosen, "still_improving": 10 * chosen > 9 * iterations}
    same = ("validation_recall@1", "metrics", "panel", "training_seconds", "network_sha256")
    return [
        entry | {name: result[name] for name in same} | {"similarity_density": result["similarity_density"]["after"]}
    ]


def result_rows(config: RunConfig, result: dict[str, Any], dataset: Dataset, exact: bool) -> list[dict[str, Any]]:
    """The columns of a run that follow from its result, at each of its lengths.

    A row at a length is that of a run of so many iterations, except for `reverse_probability`.

    Args:
        config: settings of the run.
        result: content of its result.json.
        dataset: the dataset of the run.
        exact: compute the exact probability of reverse at the last length, which is slow; otherwise it is NaN.

    Returns:
        Column -> value for each length, the shortest first; metrics are fractions. A run without validation has no
        validation_recall@1 (NaN).

    Raises:
        ConfigError: if a number of the result is NaN or infinite.
    """
    if wrong := non_finite(result):
        raise ConfigError(
            f"{config.folder / 'result.json'} has a number that is not finite: got {wrong}; delete this folder and run "
            "the study again"
        )
    lengths = reported(result)
    of_queries = _query_columns(config.folder, dataset)
    rows = [
        _length_columns(config, result, at, dataset) | queries
        for at, queries in zip(lengths, of_queries, strict=True)
    ]  # fmt: skip
    if exact:
        rows[-1]["reverse_probability"] = _reverse_probability(config.folder, dataset)
    return rows


def _length_columns(config: RunConfig, result: dict[str, Any], at: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """The columns of a run at one length, an entry of `reported`."""
    history = read_history(config.folder)
    validated = pd.DataFrame({"iteration": [], "validation_recall@1": []})
    if len(history):
        validated = history[history["validation_recall@1"].notna() & (history["iteration"] <= at["iterations"])]
    density = {"before": result["similarity_density"]["before"], "after": at["similarity_density"]}
    return {
        "complete": True,
        "network": result["config"]["network"],
        **at["metrics"],
        "validation_recall@1": math.nan if at["validation_recall@1"] is None else at["validation_recall@1"],
        "chosen_iteration": at["chosen_iteration"],
        "still_improving": at["still_improving"],
        "chosen_how": result["chosen"]["how"],
        "trained_on": result["trained_on"],
        "protocol": result["protocol"],
        "n_queries": result["n_queries"],
        "n_unmatched": result["n_unmatched"],
        "prepared": json.dumps(dataset.card.get("settings", {})),
        "training_seconds": at["training_seconds"],
        "history_iteration": validated["iteration"].astype(int).tolist(),
        "history_recall": validated["validation_recall@1"].tolist(),
        "nodes": density["after"]["nodes"],
        **{f"{sign}_{when}": density[when][sign] for sign in ("positive", "negative") for when in ("before", "after")},
        "reverse_probability": math.nan,
        "trained_overlap": 100 * at.get("trained_overlap", math.nan),  # older results lack it
        "panel": json.dumps(at["panel"]),
        **result["fingerprint"],
        **_provenance_columns(result["provenance"]),
    }


def _provenance_columns(provenance: dict[str, Any]) -> dict[str, Any]:
    return {
        "git_commit": f"{provenance['git_commit'] or 'no git'}{' with changes' * provenance['git_dirty']}",
        "device": provenance["device"],
        "processor": provenance.get("processor", ""),  # older results lack it
        "threads": provenance["threads"],
        "torch": provenance["packages"]["torch"],
    }


def _query_columns(folder: Path, dataset: Dataset) -> list[dict[str, Any]]:
    """The columns that follow from the ranks of the queries, at each length of a run.

    `ranks`, uint16 (q,), has the rank of each query's first match; 0: the query has no match. Ranks beyond the largest
    K of the dataset's recall@K are that K plus 1, which halves the size of a table.
    `query_classes`, int32 (q,), has the classes of the queries. `classes_low` and `classes_high` are the 95 % bootstrap
    interval of Recall@1 over test classes, as fractions.
    """
    ranks, queries = (_array(folder / f"{name}.npy") for name in ("ranks", "queries"))
    classes = dataset.index.label.to_numpy()[dataset.rows("test")][queries].astype(np.int32)
    rows = []
    for found in np.atleast_2d(ranks):  # older runs have one length and one dimension
        matched = found > 0
        _, low, high = bootstrap_over_classes(found[matched] == 1, classes[matched], np.random.default_rng(0))
        packed = np.minimum(found, max(dataset.card["recall_at"]) + 1).astype(np.uint16)
        rows.append({"classes_low": low, "classes_high": high, "ranks": packed, "query_classes": classes})
    return rows


def _reverse_probability(folder: Path, dataset: Dataset) -> float:
    """The exact probability of reverse over a run's query and gallery images, in [0, 1]."""
    known = identified_rows(dataset)
    labels = dataset.labels(dataset.rows("test"))[known]
    return reverse_probability(torch.from_numpy(_array(folder / "embeddings.npy")[known]), labels)


def _array(file: Path) -> NDArray[Any]:
    with reading_of_run(file):
        return np.load(file)


def read_history(folder: Path) -> pd.DataFrame:
    """Content of `history.parquet` in a run's folder.

    Raises:
        DamagedError: the file is missing or damaged.
    """
    file = folder / "history.parquet"
    with reading_of_run(file):
        return pd.read_parquet(file)


def refuse_mixed_settings(study: Study) -> None:
    """Refuse a study whose results `refuse_mixed` would refuse because of the settings of its runs.

    Args:
        study: the study, before its runs.

    Raises:
        ConfigError: if trained runs of a dataset differ in one of `SAME_SETTINGS`; the message names the run.
    """
    first: dict[tuple[str, str], tuple[StudyRun, Any]] = {}
    for run in (*study.runs, *study.waiting):
        if run.config.iterations == 0 or all(name.endswith(CHOICE) for name in run.methods):
            continue
        settings = run.config.model_dump() | run.config.network_settings()
        for name in SAME_SETTINGS:
            other, usual = first.setdefault((run.dataset, name), (run, settings[name]))
            if settings[name] != usual:
                raise ConfigError(
                    f"{name} must be the same in all trained runs on {run.dataset}, which are compared: got {usual!r} "
                    f"for {other.method!r} and {settings[name]!r} for {run.method!r}; set {name} in fixed, or make one "
                    "study of each"
                )


def refuse_mixed(table: pd.DataFrame) -> None:
    """Refuse results that cannot be compared with each other.

    All results of a dataset need the same protocol and data. Trained runs also need the same network and the same way
    of choosing the iteration. Exempt from the second rule are runs without training, which are baselines, and runs of a
    grid, which are compared only with each other.

    Args:
        table: the table of `collect`.

    Raises:
        ConfigError: if results differ in one of these; the message names the run.
    """
    complete = table[table["complete"]]
    complete = complete.assign(prepared=complete["prepared"].map(_without_test_set))
    of_grid = complete["comparison"].map(lambda names: all(name.endswith(CHOICE) for name in names))
    trained = complete[(complete["iterations"] > 0) & ~of_grid]
    for name in (*SAME_IN_ALL_RUNS, *SAME_IN_TRAINED_RUNS):
        checked = complete if name in SAME_IN_ALL_RUNS else trained
        for dataset, runs in checked.groupby("split" if name == "card_sha256" else "dataset"):
            usual = runs[name].mode()[0]
            other = runs[runs[name] != usual]
            if len(other):
                run = other.iloc[0]
                raise ConfigError(
                    f"run {run['run_id']} ({run['method'][0]}) on {dataset} has {name}={short_value(run[name])!r}, the "
                    f"other runs have {short_value(usual)!r}; such results cannot be compared: run it again, or remove "
                    "it from the study"
                )
    splits = complete.drop_duplicates("split")
    for (dataset, _), same in splits.groupby(["dataset", "card_sha256"]):
        if len(same) > 1:
            raise ConfigError(f"{' and '.join(same['split'])} are the same split of {dataset}; prepare them again")


def _without_test_set(settings: str) -> str:
    """The settings of a card without `test_set`, which differs between the splits of a dataset."""
    return json.dumps({name: value for name, value in json.loads(settings).items() if name != "test_set"})


def read_results(file: Path) -> pd.DataFrame:
    """Read a study's table of results.

    Args:
        file: a results.parquet; if there are parts in the folder `parts` beside it, these are merged instead.

    Returns:
        One row per run, comparison and length in the order of the study, metrics in %. `length` is the number of
        iterations after which the test is reported: 0 for a run without training, else one of `report_at` and
        `iterations`. `chosen_iteration`, `still_improving` (the best validation lies in the last tenth of the length),
        metrics, histories, densities and ranks are those of the length; `at_length` selects one. `complete` is False
        for a run without a result. `ranks` and `query_classes` are missing for runs of a grid and in older tables.

    Raises:
        ConfigError: if the table cannot be read, if results cannot be compared (`refuse_mixed`), or if parts cannot be
            merged (`merged_parts`).
    """
    table = merged_parts(file) if parts_of(file) else read_table(file)
    if "length" not in table:  # an older table: one length per run
        improving = 10 * table["chosen_iteration"] > 9 * table["iterations"]
        table = table.assign(length=table["iterations"], still_improving=improving)
    table["still_improving"] = table["still_improving"].eq(True)  # missing in runs without a result
    refuse_mixed(table)
    fractions = ("recall@", "validation_recall@", "map", "r_precision", "classes_")
    metrics = [name for name in table.columns if name.startswith(fractions)]
    table[metrics] *= 100
    table = table.explode(["comparison", "method", "place"])
    return _in_few_blocks(table.sort_values("place", kind="stable", ignore_index=True))


def _in_few_blocks(table: pd.DataFrame) -> pd.DataFrame:
    """The same table stored in one block per type, with texts as objects.

    pandas stores each column of another type of text by itself, and then takes rows several times as slowly. Verdicts
    take rows thousands of times.
    """
    texts = table.select_dtypes("string").columns
    return table.astype(dict.fromkeys(texts, object)).copy()


def at_length(results: pd.DataFrame, length: int | None = None) -> pd.DataFrame:
    """The rows of one training length; runs without training belong to every length.

    Args:
        results: the table of `read_results`, or a table with its columns dataset, comparison, method and length.
        length: in iterations; None: the longest length of each method of a comparison.

    Returns:
        The matching rows.

    Raises:
        ConfigError: if no row has the length.
    """
    if length is None:
        longest = results.groupby(["dataset", "comparison", "method"])["length"].transform("max")
        return results[results["length"] == longest]
    if length not in (known := lengths_in(results)):
        raise ConfigError(f"length is unknown: got {length}; allowed are {', '.join(map(str, known))}")
    return results[results["length"].isin([0, length])]


def lengths_in(results: pd.DataFrame) -> list[int]:
    """The training lengths of a table, in iterations, the shortest first; 0 (no training) is left out."""
    return sorted(int(length) for length in set(results["length"]) - {0})


def distinct_runs(results: pd.DataFrame) -> pd.DataFrame:
    """One row per run, that of its longest length, in the order of the table.

    Args:
        results: complete runs of `read_results`.
    """
    longest_first = results.sort_values("length", ascending=False, kind="stable")
    return longest_first.drop_duplicates("run_id").sort_index()


def select_results(results: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The rows of a table of results that have these values.

    Args:
        results: the table of `read_results`.
        **wanted: column -> value, as in `dataset="glyphs", seed=0`.

    Returns:
        The matching rows.

    Raises:
        ConfigError: if no row has one of the values.
    """
    for name, value in wanted.items():
        known = [v for v in results[name].unique() if not str(v).endswith(OF_TUNING)]
        if value not in results[name].unique():
            raise ConfigError(f"{name} is unknown: got {value!r}; allowed are {', '.join(map(str, known))}")
        results = results[results[name] == value]
    return results


def recall_names(results: pd.DataFrame) -> list[str]:
    """Names of the Recall@K columns that have a value.

    Args:
        results: the table of `read_results`.

    Returns:
        Names such as "recall@1", sorted by K.
    """
    names = [name for name in results.columns if name.startswith("recall@") and results[name].notna().any()]
    return sorted(names, key=lambda name: int(name.removeprefix("recall@")))


def recalls_over_k(results: pd.DataFrame) -> pd.DataFrame:
    """Test Recall@K in long form.

    Args:
        results: complete runs of `read_results` at one length.

    Returns:
        One row per run and K. Columns: method, seed, K, recall (%).
    """
    recalls = results.melt(["method", "seed"], recall_names(results), var_name="K", value_name="recall").dropna()
    return recalls.assign(K=recalls["K"].str.removeprefix("recall@").astype(int))


def histories(results: pd.DataFrame) -> pd.DataFrame:
    """Validation Recall@1 during training in long form.

    Args:
        results: complete runs of `read_results` at one length; runs without training or validation are left out.

    Returns:
        One row per run and validation. Columns: method, seed, iteration, recall (%).
    """
    trained = results[results["iterations"] > 0]
    validations = trained[["method", "seed", "history_iteration", "history_recall"]].set_axis(
        ["method", "seed", "iteration", "recall"], axis=1
    )
    validations = (
        validations.explode(["iteration", "recall"], ignore_index=True)
        .dropna()
        .astype({"iteration": int, "recall": float})
    )
    return validations.assign(recall=100 * validations["recall"])


def chosen_settings(results: pd.DataFrame) -> pd.DataFrame:
    """The settings that tuning chose at each length.

    Args:
        results: the table of `read_results`.

    Returns:
        One row per dataset, tuned comparison, method and length. Columns: dataset, comparison, method, length, chosen
        (values of the settings in the grid), "at an edge of its grid" (settings whose value is the smallest or largest
        of the grid, with its extensions), "runs of the grid" (as "20", or "20 + 4" with those of the extensions), "on
        the initial grid" (the chosen values without extensions; empty if there are none), run_ids (of the grid). If
        runs of a grid are equally good, also "equally good runs" (their number where it is above 1); the first is
        chosen.
    """
    rows = []
    tuned = _tuned(results)
    for (dataset, comparison, method, length), runs in tuned.groupby(
        ["dataset", "comparison", "method", "length"], sort=False
    ):
        of_length = results[(results["dataset"] == dataset) & (results["length"] == length)]
        grid, added = grid_of(of_length, comparison, method)
        before = of_length[(of_length["comparison"] == f"{comparison}{INITIAL}") & (of_length["method"] == method)]
        grid = pd.concat([grid, added])
        axes = _axes(grid)
        chosen, known = runs.iloc[0], bool(runs.iloc[0]["run_id"])
        edges = [name for name in axes if known and chosen[name] in (grid[name].min(), grid[name].max())]
        recalls = grid.loc[grid["complete"], "validation_recall@1"]
        best = int((recalls == recalls.max()).sum())
        rows.append(
            {
                "dataset": dataset,
                "comparison": comparison,
                "method": method,
                "length": length,
                "chosen": _shown_settings(chosen, axes) if known else "not chosen yet",
                "at an edge of its grid": ", ".join(edges),
                "runs of the grid": grid_size(of_length, comparison, method),
                "on the initial grid": _shown_settings(before.iloc[0], axes) if len(before) else "",
                "run_ids": ", ".join(grid.loc[grid["complete"], "run_id"]),
                "equally good runs": best if best > 1 and known else None,
            }
        )
    return pd.DataFrame(rows).dropna(axis="columns", how="all")


def better_settings(results: pd.DataFrame) -> pd.DataFrame:
    """Settings that a grid could choose and did not, whose test Recall@1 is above that of the chosen ones.

    Runs of any comparison count that differ from the chosen runs in settings of the grid alone.

    Args:
        results: the table of `read_results`.

    Returns:
        The best such settings of each tuned method and length whose 95 % interval of the paired difference lies above
        0. Columns: dataset, comparison, method, length, chosen, "chosen: recall@1 (%)", better (settings), "better:
        recall@1 (%)", difference (in points), low and high. As they are found on the test classes, the difference
        overestimates what they gain.
    """
    rows = []
    complete = results[results["complete"]]
    for names, chosen in _tuned(complete).groupby(["dataset", "comparison", "method", "length"], sort=False):
        dataset, comparison, method, length = names
        of_length = complete[(complete["dataset"] == dataset) & (complete["length"] == length)]
        axes = _axes(pd.concat(grid_of(of_length, comparison, method)))
        found = [
            (difference, runs)
            for runs in _with_other_values(of_length, chosen, axes)
            if (difference := paired_difference(runs, chosen)).interval()[0] > 0
        ]
        if found:
            difference, runs = max(found, key=lambda entry: entry[0].mean)
            low, high = difference.interval()
            recalls = [round(part["recall@1"].mean(), 1) for part in (chosen, runs)]
            shown = [_shown_settings(part.iloc[0], axes) for part in (chosen, runs)]
            rows.append([*names, shown[0], recalls[0], shown[1], recalls[1], difference.mean, low, high])
    columns = ["dataset", "comparison", "method", "length", "chosen", "chosen: recall@1 (%)", "better"]
    return pd.DataFrame(rows, columns=[*columns, "better: recall@1 (%)", "difference", "low", "high"])


def _with_other_values(of_length: pd.DataFrame, chosen: pd.DataFrame, axes: list[str]) -> list[pd.DataFrame]:
    """Runs with all seeds of the chosen runs that differ from them in `axes` alone, one table per combination."""
    same = [name for name in RunConfig.model_fields if name in of_length and name not in (*axes, "seed", "iterations")]
    values, wanted = of_length[same], chosen.iloc[0][same]
    alike = (values.eq(wanted) | values.isna() & wanted.isna()).all(axis=1)
    runs = of_length[alike & of_length["seed"].isin(chosen["seed"])]
    runs = runs.drop_duplicates([*axes, "seed"])  # a longer run reports the same result at this length
    combinations = [table for _, table in runs.groupby(axes)] if axes else []
    return [table for table in combinations if set(table["seed"]) == set(chosen["seed"])]


def grid_recalls(results: pd.DataFrame) -> pd.DataFrame:
    """Validation Recall@1 of each run of the grids, in %.

    Args:
        results: rows of one length of each method, from `read_results`.

    Returns:
        One row per dataset, tuned comparison, method and combination of the other settings of its grid ("n_bins 50");
        one column per learning rate ("learning rate 0.001"). Grids without several learning rates are left out.
    """
    tables = []
    tuned = _tuned(results)
    for dataset, comparison, method in tuned[["dataset", "comparison", "method"]].drop_duplicates().to_numpy():
        grid = pd.concat(grid_of(results[results["dataset"] == dataset], comparison, method))
        axes = _axes(grid)
        if "learning_rate" in axes:
            others = [name for name in axes if name != "learning_rate"]
            of_grid = grid.sort_values([*others, "learning_rate"])
            shown = [_shown_settings(run, others) for _, run in of_grid.iterrows()]
            of_grid = of_grid.assign(dataset=dataset, comparison=comparison, method=method, settings=shown)
            tables.append(
                of_grid[["dataset", "comparison", "method", "settings", "learning_rate", "validation_recall@1"]]
            )
    if not tables:
        return pd.DataFrame()
    keys = ["dataset", "comparison", "method", "settings"]
    rows = pd.concat(tables, ignore_index=True)
    order = rows[keys].drop_duplicates()
    wide = rows.pivot(index=keys, columns="learning_rate", values="validation_recall@1").reindex(order)
    return wide.rename(columns=lambda rate: f"learning rate {rate:g}").rename_axis(columns=None).reset_index()


def grid_of(results: pd.DataFrame, comparison: str, method: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs of the grid of a tuned method.

    Args:
        results: rows of one dataset and length, from `read_results`.
        comparison: the tuned comparison.
        method: name of the method in it.

    Returns:
        The runs of the initial grid, and the runs that were added to it; both empty if the method is not tuned.
    """
    runs = results[results["method"].str.startswith(f"{method}, ")]
    initial, added = (f"{comparison}{CHOICE}", f"{comparison}{EXTENDED}{CHOICE}")
    return runs[runs["comparison"] == initial], runs[runs["comparison"] == added]


def _tuned(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of the comparisons that have grids, without those of the grids."""
    names = results["comparison"].unique()
    return results[results["comparison"].isin([name for name in names if f"{name}{CHOICE}" in names])]


def _axes(grid: pd.DataFrame) -> list[str]:
    """The settings in which the runs of a grid differ."""
    return [name for name in RunConfig.model_fields if name in grid and grid[name].nunique() > 1]


def grid_size(results: pd.DataFrame, comparison: str, method: str) -> str:
    """Number of runs of a grid as text: "20", or "20 + 4" with added ones; arguments as in `grid_of`."""
    initial, added = grid_of(results, comparison, method)
    return f"{len(initial)}{f' + {len(added)}' * bool(len(added))}"


def _shown_settings(run: pd.Series, axes: list[str]) -> str:
    return ", ".join(f"{name} {run[name]:g}" for name in axes)
