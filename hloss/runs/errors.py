"""Errors that a run raises; each message names the setting, file or row and the remedy."""


class ConfigError(ValueError):
    """A setting of a run is unknown or out of range; the message names it, its value and what is allowed."""


class DatasetError(ValueError):
    """The folder is no prepared dataset, or not the one its card describes; the message names file and remedy."""


class RunError(RuntimeError):
    """A run cannot go on; the message says why and what to do."""


class RunStopped(RunError):
    """A signal stopped a run after it saved its state; started again, it continues."""


class LockedError(RunError):
    """Another process holds a lock; the message says what that process does."""


class NetworkError(RunError):
    """The network of a run cannot be loaded; the message names the file and the remedy."""
