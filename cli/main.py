"""The program `patchbank`. Importing this loads no torch: each command loads what it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from patchbank.cli import (
    bank,
    check,
    compare,
    demo,
    encoders,
    export,
    extract,
    predict,
    probes,
    train,
    worker,
)
from patchbank.cli.typed_command import TYPED
from patchbank.pipeline.errors import PatchbankError

app = typer.Typer(
    name="patchbank",
    help="Run a frozen audio encoder once, keep every patch token, train any number of probes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("demo")(demo.demo)
app.command("extract")(extract.extract)
app.command("worker")(worker.worker)
app.command("train-probe")(train.train_probe)
app.command("compare")(compare.compare)
app.command("predict")(predict.predict)
app.command("export")(export.export)
app.command("encoders")(encoders.encoders)
app.command("check")(check.check)
app.command("probes")(probes.probes)
app.add_typer(bank.app, name="bank")


INTERRUPTED = 130
GO_ON = (["demo"], ["extract"], ["train-probe"], ["bank", "push"], ["bank", "pull"])
"""Commands that go on where they were stopped."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line; 0 done, 1 failed, 2 misused. Errors are printed without traceback."""
    # OpenMP threads that spin while they wait take the cores from decoding and loading: a
    # protobin step on two busy cores took 442 ms, this way 124 ms. Read once, when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    typed = list(sys.argv[1:] if arguments is None else arguments)
    TYPED.set(("patchbank", *typed))
    try:
        app(args=typed)
    except PatchbankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {_system_reason(error)}", file=sys.stderr)
        return 1
    except SystemExit as stop:
        # typer turns Ctrl-C into this code.
        if stop.code == INTERRUPTED:
            goes_on = "; the same command goes on from here" if is_resumed(typed) else ""
            print(f"interrupted{goes_on}", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def is_resumed(typed: Sequence[str]) -> bool:
    """Whether a command line goes on where it was stopped."""
    return any(list(typed[: len(names)]) == names for names in GO_ON)


def _system_reason(error: OSError) -> str:
    """What the operating system refused, and where, in one line."""
    place = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or str(error).splitlines()[0]}{place}"


def run() -> None:
    """The console script."""
    sys.exit(main())
