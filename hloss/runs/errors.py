"""Exceptions of runs, and texts for their messages. A message names the setting, file or row, and then the remedy."""

from pydantic_core import ErrorDetails

# Type of an error of pydantic -> the allowed values
KINDS = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "too_short": "a list of at least one value",
}


class ConfigError(ValueError):
    """A setting of a run is unknown or out of range; the message gives its value and the allowed values."""


class DatasetError(ValueError):
    """A folder is not a prepared dataset, or its files do not match its card; the message gives file and remedy."""


class RunError(RuntimeError):
    """A run cannot continue; the message gives the reason and the remedy."""


class RunStopped(RunError):
    """A signal stopped a run after the run saved its state; a new start continues it."""


class LockedError(RunError):
    """Another process has the lock of a file or folder; the message says what that process does."""


class GPUMemoryError(RunError):
    """A GPU has too little memory for a run; the message names the settings that reduce the memory."""


class NetworkError(RunError):
    """The trained network of a run cannot be loaded; the message gives file and remedy."""


class DamagedError(RunError):
    """A file of a complete run is missing or damaged; the message gives file and remedy."""


def allowed_by(error: ErrorDetails) -> str:
    """Describe the allowed values of a setting that has a wrong type or value.

    Args:
        error: one error of a pydantic model.

    Returns:
        Words that follow "must be", such as "a whole number".
    """
    kind, value = error["type"], error["input"]
    allowed = KINDS.get(kind) or error["msg"].removeprefix("Input should be ")
    is_scalar = not isinstance(value, list | dict | None)
    return allowed + "; put it in quotes" * (kind == "string_type" and is_scalar)
