"""Exceptions of runs. Each message names the setting, file or row first, and then the remedy."""


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
    """The memory of a GPU does not suffice for a run; the message names the settings that need less."""


class NetworkError(RunError):
    """The trained network of a run cannot be loaded; the message gives file and remedy."""
