"""Code shared by the commands: help, composing and checking the config, short errors instead of tracebacks."""

import io
import os
import signal
import sys
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from llama_ft import __version__
from llama_ft.cli.compose import checked_config, command_line, composed_config, register, typed_overrides
from llama_ft.cli.effects import remarks
from llama_ft.cli.explain import explain
from llama_ft.cli.sweeps import composed_runs, is_sweep
from llama_ft.cli.texts import as_typed
from llama_ft.cli.usage import Usage, print_help
from llama_ft.config import UserError

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130  # exit statuses


class Stop(BaseException):
    """Ends a whole sweep with a message. Hydra would catch an Exception and continue with the next run."""


EXPECTED = (Stop, UserError, HydraException, OmegaConfBaseException, OSError, ValueError)  # none of them is our bug


def _output_fails() -> bool:
    """Return True if standard output cannot be written, as on a full disk; its errors, like others, name no file."""
    try:
        print(end="", flush=True)
    except OSError:
        return True
    return False


def _close_output() -> None:
    """Discard standard output, which Python would try to write again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(function: Callable[[], int], usage: Usage) -> None:
    """Run a command and exit with the status it returns; errors are printed as text unless HYDRA_FULL_ERROR=1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as for standard error
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # a queue sends the latter before a time limit
        signal.signal(number, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a closed terminal; under nohup it is ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then passes errors on to us
    try:
        status = 0
        if {"--help", "-h"} & set(sys.argv[1:]):
            print_help(usage, Console())
        elif "--version" in sys.argv[1:]:
            print(f"llama_ft {__version__}")
        else:
            status = function()
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        _close_output()
        sys.exit(FAILED)
    except (Stop, Exception) as error:
        if wants_traceback:
            raise
        if isinstance(error, OSError) and not error.filename and _output_fails():
            _close_output()
            print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
            sys.exit(FAILED)
        print(f"error: {error if isinstance(error, Stop) else explain(error, usage.schema)}", file=sys.stderr)
        if not isinstance(error, EXPECTED):
            print("this looks like a bug in llama_ft; HYDRA_FULL_ERROR=1 shows where", file=sys.stderr)
        sys.exit(USAGE_ERROR)
