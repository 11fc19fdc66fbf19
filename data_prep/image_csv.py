"""Read the CSV file that lists a user's own images, and check its columns, values and images."""

import csv
import io
import re
from pathlib import Path, PurePosixPath

import pandas as pd

from data_prep.archives import Source
from data_prep.prepared import PreparationError
from hloss.runs.datasets import ROLES, SPLITS

REQUIRED, OPTIONAL = ("path", "label"), ("split", "camera", "role")
UNLABELED_ROLES = ("junk", "distractor")  # images of no class
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def read_csv(file: Path) -> pd.DataFrame:
    """Read a CSV file of images.

    Args:
        file: The CSV file, in UTF-8. Commas, semicolons, tabs or vertical bars separate its columns; a first line
            such as `sep=;` states the separator. Column names may be in upper case.

    Returns:
        One row of text per image, without surrounding blanks: path, label, and optionally split, camera and role.

    Raises:
        PreparationError: the file is not such a CSV; the message names the column or the image.
    """
    columns, rows, separator = _read_fields(file)
    separated = f"separated by {SEPARATORS.get(separator, repr(separator))}"
    if problem := _column_problem(columns):
        raise PreparationError(
            f"{file}: {problem}: got {', '.join(columns) or 'none'} ({separated}); "
            f"required columns are {', '.join(REQUIRED)}, optional ones {', '.join(OPTIONAL)}"
        )
    if not rows:
        raise PreparationError(f"{file} has a header but no rows; add one row per image")
    for row in rows:
        if len(row) != len(columns):
            raise PreparationError(
                f"{file}: a row must have {len(columns)} fields {separated}: got {len(row)} in "
                f"{separator.join(row)!r}; put a field that contains the separator in quotes"
            )
    listed = pd.DataFrame(rows, columns=columns)
    listed["path"] = [_path_below(file, path) for path in listed.path]
    _check_values(file, listed)
    return listed


def _column_problem(columns: list[str]) -> str:
    if missing := [c for c in REQUIRED if c not in columns]:
        return f"missing columns {', '.join(missing)}"
    if unknown := [c for c in columns if c not in REQUIRED + OPTIONAL]:
        return f"unknown columns {', '.join(unknown)}"
    return "repeated columns" if len(set(columns)) < len(columns) else ""


def _read_fields(file: Path) -> tuple[list[str], list[list[str]], str]:
    """Return column names in lower case, rows, and the separator: the one that yields most known columns."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        stated = re.match(r"sep=(.)\r?\n", text)  # Excel writes and reads this line
        text = text[stated.end() :] if stated else text
        separator = stated[1] if stated else max(SEPARATORS, key=lambda sep: _known_columns(text, sep))
        columns, *rows = _fields(text, separator, strict=True) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PreparationError(
            f"{file} cannot be read as CSV in UTF-8: {error}; check the encoding and the quotes"
        ) from error
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
        raise PreparationError(f"{file}: path must be relative to the CSV's folder and inside it: got {path!r}")
    return "/".join(parts)


def check_present(file: Path, paths: pd.Series, source: Source) -> None:
    """Refuse a CSV that lists images that do not exist.

    Args:
        file: The CSV file, for the message.
        paths: Paths of the images, relative to its folder.
        source: The folder of the CSV.

    Raises:
        PreparationError: an image does not exist; the message suggests a path that differs only in case.
    """
    lacking = [path for path in paths if path not in source.files]
    if lacking:
        similar = {name.lower(): name for name in source.files}.get(lacking[0].lower())
        raise PreparationError(
            f"{file}: {len(lacking):,} of {len(paths):,} images do not exist, the first is {lacking[0]}"
            f"{f' (did you mean {similar}?)' if similar else ''}; paths are relative to the CSV's folder"
        )


def _check_values(file: Path, listed: pd.DataFrame) -> None:
    rules = {
        "split": (lambda v: v in SPLITS, f"one of {', '.join(SPLITS)}"),
        "role": (lambda v: v in ROLES, f"one of {', '.join(ROLES)}"),
        "camera": (lambda v: v == "" or v.isdigit(), "a whole number or empty"),
    }
    for column, (is_allowed, meaning) in rules.items():
        if column in listed:
            wrong = listed[[not is_allowed(value) for value in listed[column]]]
            if len(wrong):
                path, value = wrong.path.iloc[0], wrong[column].iloc[0]
                raise PreparationError(f"{file}: {column} of {path} must be {meaning}: got {value!r}")
    role = listed.role if "role" in listed else pd.Series("both", index=listed.index)
    unlabeled = listed.path[(listed.label == "") & ~role.isin(UNLABELED_ROLES)]
    if len(unlabeled):
        raise PreparationError(
            f"{file}: label of {unlabeled.iloc[0]} is empty; only images of role junk or distractor need no label"
        )
    twice = listed.path[listed.path.duplicated()]
    if len(twice):
        labels = sorted(set(listed.label[listed.path == twice.iloc[0]]))
        raise PreparationError(
            f"{file}: {twice.iloc[0]} is listed twice, with labels {labels}; give each image one row"
        )
