"""The command line: its commands in their order, and what is said where one fails. Every problem of the user's is one line
and exit code 2."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ditq.commands.bench import bench
from ditq.commands.calibrate import calibrate
from ditq.commands.compile import compile_command
from ditq.commands.doctor import doctor
from ditq.commands.evaluate import evaluate
from ditq.commands.inspect import inspect
from ditq.commands.lists import families, passes, recipes, targets
from ditq.commands.plan import plan_command
from ditq.commands.sample import sample
from ditq.errors import DitqError, Interrupted

# Set before torch is loaded: threads that wait asleep. Spinning ones cost many times the work itself where other programs
# share the processor and the operators are small.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INTERRUPTED = "interrupted; nothing was left half-written"


class _Commands(click.Group):
    """Commands in the order in which they are written below, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ditq")
def cli() -> None:
    """Compress a diffusion transformer and get an engine that really runs low-bit.

    \b
    ditq compile mini -o engine                   compile the built-in checkpoint
    ditq sample engine "smirking face, noto"     draw with the engine
    ditq evaluate engine --against mini           how much was lost
    """


for command in (
    compile_command, calibrate, sample, evaluate, bench, inspect, plan_command, doctor, recipes, passes, families, targets,
):  # fmt: skip
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    with _ended_as_by_ctrl_c():
        _run(arguments)


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """What a batch system sends before it ends a job, SIGTERM, leaves as little behind, or as much, as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: list[str] | None) -> None:
    try:
        code = cli.main(arguments, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.exceptions.Abort, KeyboardInterrupt) as error:  # click turns the one into the other
        interruption = error.__cause__ if isinstance(error, click.exceptions.Abort) else error
        _fail(str(interruption) if isinstance(interruption, Interrupted) else INTERRUPTED)
    except DitqError as error:
        _fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for every command
            raise
        _fail(
            f"not enough memory on the GPU: {str(error).splitlines()[0]} Give --device cpu, or close what else uses it"
        )
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another file or folder"
        _fail(f"{place}{error.strerror}; {advice}")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
