"""Suggestions for misspelt names: of settings, losses and studies."""

import difflib
from collections.abc import Iterable


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean NAME?)` with the most similar allowed name, or an empty string if none is similar."""
    similar = difflib.get_close_matches(value, list(allowed), n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""
