"""The CSV that names anyone's own images: its form, its values, and the pictures it names."""

import csv
import io
import re
from pathlib import Path, PurePosixPath

import pandas as pd

from data_prep.archives import Source
from data_prep.prepared import PreparationError
from hloss.runs.datasets import ROLES, SPLITS

REQUIRED, OPTIONAL = ("path", "label"), ("split", "camera", "role")
NOBODY = ("junk", "distractor")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_csv(file: Path) -> pd.DataFrame:
    """The rows of a CSV as text without surrounding blanks, its columns and paths checked."""
    columns, rows, separator = _read_fields(file)
    found = f"the columns {', '.join(columns)}, separated by {SEPARATORS.get(separator, separator)}"
    lacking = [c for c in REQUIRED if c not in columns]
    unknown = [c for c in columns if c not in REQUIRED + OPTIONAL]
    if lacking or unknown or not rows or len(set(columns)) < len(columns):
        raise PreparationError(
            f"{file} has {found}, and {len(rows)} rows{': it lacks ' + ', '.join(lacking) if lacking else ''}; "
            f"the columns are {', '.join(REQUIRED)}, and optionally {', '.join(OPTIONAL)}, each once"
        )
    for row in rows:
        if len(row) != len(columns):
            raise PreparationError(
                f"{file}: the row {separator.join(row)!r} has {len(row)} fields, the header has {found}; put quotes "
                "around a field that holds the separator"
            )
    listed = pd.DataFrame(rows, columns=columns)
    listed["path"] = [_path_below(file, path) for path in listed.path]
    _check_values(file, listed)
    return listed


def _read_fields(file: Path) -> tuple[list[str], list[list[str]], str]:
    """Column names in lower case, rows, and the separator: the one that finds most of the known columns."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        stated = re.match(r"sep=(.)\r?\n", text)  # how Excel names it
        text = text[stated.end() :] if stated else text
        separator = stated[1] if stated else max(SEPARATORS, key=lambda sep: _known_columns(text, sep))
        columns, *rows = _fields(text, separator, strict=True) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PreparationError(f"{file} cannot be read as CSV in UTF-8: {error}") from error
    return [name.lower() for name in columns], rows, separator


def _known_columns(text: str, separator: str) -> int:
    (columns,) = _fields(text.lstrip().partition("\n")[0], separator, strict=False) or [[]]
    return len({name.lower() for name in columns} & {*REQUIRED, *OPTIONAL})


def _fields(text: str, separator: str, strict: bool) -> list[list[str]]:
    lines = io.StringIO(text, newline="")
    rows = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=strict)
    return [[field.strip() for field in row] for row in rows if any(field.strip() for field in row)]


def _path_below(file: Path, path: str) -> str:
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
        raise PreparationError(f"{file}: path {path!r} leads out of the CSV's folder; give paths below it")
    return "/".join(parts)


def check_present(file: Path, paths: pd.Series, source: Source) -> None:
    """Refuse a CSV that names pictures that are not there."""
    lacking = [path for path in paths if path not in source.files]
    if lacking:
        similar = {name.lower(): name for name in source.files}.get(lacking[0].lower())
        raise PreparationError(
            f"{file}: {len(lacking):,} of {len(paths):,} pictures are not there, the first is {lacking[0]}"
            f"{f' (there is {similar})' if similar else ''}; paths count from the CSV's folder"
        )


def _check_values(file: Path, listed: pd.DataFrame) -> None:
    rules = {
        "split": lambda v: v in SPLITS,
        "role": lambda v: v in ROLES,
        "camera": lambda v: v == "" or v.isdigit(),
    }
    for column, allowed in rules.items():
        if column in listed:
            wrong = [v for v in listed[column] if not allowed(v)]
            if wrong:
                meant = {"split": SPLITS, "role": ROLES, "camera": ("a whole number or nothing",)}[column]
                raise PreparationError(f"{file}: {column} is {wrong[0]!r} in a row, allowed are {', '.join(meant)}")
    role = listed.role if "role" in listed else pd.Series("both", index=listed.index)
    unnamed = listed.path[(listed.label == "") & ~role.isin(NOBODY)]
    if len(unnamed):
        raise PreparationError(f"{file}: {unnamed.iloc[0]} has no label; only junk and distractors have none")
    twice = listed.path[listed.path.duplicated()]
    if len(twice):
        labels = sorted(set(listed.label[listed.path == twice.iloc[0]]))
        raise PreparationError(f"{file} names {twice.iloc[0]} twice, with labels {labels}; an image has one row")
