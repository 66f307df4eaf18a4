"""The one exception that users see: a single line that says what was wrong, where, and what to do."""

from __future__ import annotations


class DitqError(Exception):
    """A problem with what the user gave. The command line prints it as `error: ...` and exits with code 2."""


class Interrupted(KeyboardInterrupt):
    """An interruption (Ctrl-C) of work whose finished part was kept; the message says how to go on."""
