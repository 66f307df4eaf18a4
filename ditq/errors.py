"""The one exception that users see: a single line that says what was wrong, where, and what to do."""

from __future__ import annotations


class DitqError(Exception):
    """A problem with what the user gave. The command line prints it as `error: ...` and exits with code 2."""
