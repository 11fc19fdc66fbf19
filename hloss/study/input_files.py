"""Read files that users write or share: YAML, CSV and tables of results in Parquet. Tables of results are also written.

Every error names the file, the line or the setting, its value, and the allowed values.
"""

import ast
import re
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hloss.names import did_you_mean
from hloss.runs.errors import ConfigError, allowed_by
from hloss.runs.files import atomic_write

Model = TypeVar("Model", bound=BaseModel)
INJECTED = "# Parameters\n"  # first line of the cell with which papermill passes parameters
OF_RESULTS = ("run_id", "dataset", "comparison", "method", "complete", "iterations")
# Words in an error of YAML -> the remedy
REMEDIES = {"'\\t'": "indent with spaces, not with tabs", "mapping values": "put text that contains ': ' in quotes"}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses repeated keys and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if key.value in keys and key.tag != "tag:yaml.org,2002:merge":
                problem = f"the key {key.value!r} occurs twice; keep one of the two"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(file: Path) -> Any:
    """Read a YAML file.

    Args:
        file: path of the file.

    Returns:
        The content: mappings, lists, text, numbers, booleans and dates.

    Raises:
        ConfigError: the file cannot be read, is empty, is not valid YAML or has a key twice in one mapping; the message
            names the line.
    """
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: the file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: the file is not text in UTF-8: {error}; save it as UTF-8") from None
    content = parse_yaml(text, str(file))
    if content is None:
        raise ConfigError(f"{file}: the file is empty; copy a committed file of this kind and change it")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text.

    Args:
        text: the text.
        where: file, or file and line, with which an error begins.

    Returns:
        As `read_yaml`; None for an empty text.

    Raises:
        ConfigError: the text is not valid YAML, or has a key twice in one mapping.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = (error.problem or str(error.context)).replace("'<stream end>'", "the end of the text")
        remedies = [f"; {remedy}" for words, remedy in REMEDIES.items() if words in problem]
        raise ConfigError(f"{where}{at}: the YAML is not valid: {problem}{''.join(remedies)}") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML does not allow; a date such as 2026-13-01
        raise ConfigError(f"{where}: the YAML is not valid: {' '.join(str(error).split())}") from None


def read_csv(file: Path, columns: Collection[str], numbers: Collection[str] = ()) -> pd.DataFrame:
    """Read a CSV file.

    Args:
        file: path of the file.
        columns: the columns that it must have.
        numbers: the columns that must contain finite numbers.

    Returns:
        The fields of `numbers` as numbers, all others as text; an empty field is "".

    Raises:
        ConfigError: the file cannot be read, has other columns, or lacks a number; the message names the line.
    """
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except OSError as error:
        raise ConfigError(f"{file}: the file cannot be read: {error.strerror}") from None
    except ValueError as error:  # pandas.errors.ParserError, EmptyDataError and UnicodeDecodeError, too
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file}: the file is not a CSV file in UTF-8: {reason}") from None
    if set(table.columns) != set(columns):
        raise ConfigError(
            f"{file} has wrong columns: got {', '.join(table.columns)}; required are {', '.join(columns)}"
        )
    for name in numbers:
        values = pd.to_numeric(table[name], errors="coerce")
        if len(wrong := table.index[~np.isfinite(values)]):
            raise ConfigError(f"{file}, line {wrong[0] + 2}: {name}: got {table[name][wrong[0]]!r}; must be a number")
        table[name] = values
    return table


def read_table(file: Path) -> pd.DataFrame:
    """Read a table of results as it was written.

    Args:
        file: results.parquet of a study, or a part.

    Raises:
        ConfigError: the file is missing, is no Parquet file, or is no table of results.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such table of results; {_remedy(file)}")
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise ConfigError(
            f"{file}: the file is damaged or no Parquet file: {' '.join(str(error).split()).rstrip('.')}; "
            f"{_remedy(file)}"
        ) from None
    if missing := [name for name in OF_RESULTS if name not in table]:
        raise ConfigError(
            f"{file}: the file is no table of results: got no column {', '.join(missing)}; allowed are tables that "
            "`make study` or `make report` wrote"
        )
    return table


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write a table of results.

    Most values differ, so the table is smaller without dictionaries of values.

    Args:
        table: the table.
        file: the Parquet file, which is replaced as a whole.
    """
    packed: dict[str, Any] = {"compression": "zstd", "compression_level": 19, "use_dictionary": False}
    atomic_write(file, lambda part: table.to_parquet(part, index=False, **packed))


def _remedy(file: Path) -> str:
    """The command that writes a table of results, or the kind of file to name instead."""
    if file.parent.name == "parts" and file.suffix == ".parquet":
        return f"`make study STUDY={file.stem}` writes this part"
    if file.name == "results.parquet":
        return f"`make report STUDY={file.absolute().parent.name}` writes it"
    return "name a results.parquet such as reports/sample/results.parquet, or a part"


def checked(model: type[Model], content: object, where: str, prefix: str = "") -> Model:
    """Check the content of a file and return it as a model.

    Args:
        model: the settings, with strict types and without extra settings.
        content: a mapping from `read_yaml`.
        where: file, or file and part of it, with which an error begins.
        prefix: text before the names of the settings in an error, such as "resources.".

    Raises:
        ConfigError: settings are missing, unknown or out of range; the message lists each with its value and the
            allowed values.
    """
    known = tuple(model.model_fields)
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: got {shown(content)}; must be a mapping with the settings {', '.join(known)}")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [prefix * bool(e["loc"]) + _problem(e, known) for e in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from None


def _problem(error: ErrorDetails, known: tuple[str, ...]) -> str:
    """One error of pydantic, as `setting: got value; what is allowed`."""
    kind, value = error["type"], error["input"]
    name = ".".join(str(part) for part in error["loc"] if part != "[key]")
    if kind == "missing":
        return f"{name}: missing; this setting is required"
    if kind == "extra_forbidden":
        return f"{name}: unknown setting{did_you_mean(name, known)}; allowed are {', '.join(known)}"
    if kind == "value_error":
        allowed = error["msg"].removeprefix("Value error, ")
        return f"{name}: got {shown(value)}; {allowed}" if name else allowed
    return f"{name}: got {shown(value)}; must be {allowed_by(error)}"


def shown(value: object) -> str:
    """A value as it is written in YAML: true for True, text in quotes.

    Args:
        value: value from `read_yaml`.
    """
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str | list | dict) else str(value)


def check_parameters() -> None:
    """Refuse parameters that papermill passed to this notebook and that its cell of parameters does not have.

    papermill itself only warns, and the notebook would use the default. Without papermill nothing is checked.

    Raises:
        ConfigError: a parameter is unknown; the message lists those of the notebook.
    """
    from IPython import get_ipython  # imported here because its import takes long; a notebook has imported it

    shell = get_ipython()
    for defaults, cell in pairwise(shell.user_ns["In"] if shell else []):
        if cell.startswith(INJECTED):
            known = _assigned(defaults)
            unknown = [
                f"{name}: unknown parameter{did_you_mean(name, known)}" for name in _assigned(cell) if name not in known
            ]
            if unknown:
                raise ConfigError(f"{'; '.join(unknown)}; the parameters of this notebook are {', '.join(known)}")


def _assigned(cell: str) -> list[str]:
    """Names to which the code of a cell assigns values."""
    names = (node for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name))
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]
