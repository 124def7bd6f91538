"""Options of a probe, read by what they are: one of another kind stops the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.base import Options


def check_options(name: str, options: Options, known: Sequence[str]) -> None:
    """Raises `TrialError` for an option that the probe does not have."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise TrialError(f"found option {', '.join(unknown)} for probe {name!r}; {has}")


def choice(options: Options, name: str, choices: Sequence[str], default: str) -> Any:
    """The value of an option that is one of `choices`; raises `TrialError` for any other."""
    found = options.get(name, default)
    if found not in choices:
        raise TrialError(f"found {name}={found!r}, expected {' or '.join(choices)}")
    return found


def switch(options: Options, name: str, default: bool) -> bool:
    """The value of an option that is true or false; raises `TrialError` for any other."""
    found = options.get(name, default)
    if not isinstance(found, bool):
        raise TrialError(f"found {name}={found!r}, expected true or false")
    return found


def whole(options: Options, name: str, default: int, *, at_least: int = 1, other: str = "") -> int:
    """The value of an option that counts; 1e1 is 10, and 2.5 raises `TrialError`.

    `other` ends the message: what may stand there instead of a number.
    """
    found = options.get(name, default)
    if not _is_number(found) or found != int(found):
        raise TrialError(
            f"found {name}={found!r}, expected a whole number from {at_least}{_or(other)}"
        )
    if found < at_least:
        raise TrialError(f"found {name}={found!r}, expected at least {at_least}{_or(other)}")
    return int(found)


def number(
    options: Options,
    name: str,
    default: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    other: str = "",
) -> float:
    """The finite value of an option within bounds; raises `TrialError` for any other.

    `other` ends the message: what may stand there instead of a number.
    """
    found = options.get(name, default)
    bounds = [
        f"{words} {bound}"
        for words, bound in (("at least", at_least), ("more than", above), ("below", below))
        if bound is not None
    ]
    if not _is_number(found):
        expected = ", ".join(filter(None, ["a number", " and ".join(bounds)]))
        raise TrialError(f"found {name}={found!r}, expected {expected}{_or(other)}")
    if (
        (at_least is not None and found < at_least)
        or (above is not None and found <= above)
        or (below is not None and found >= below)
    ):
        raise TrialError(f"found {name}={found!r}, expected {' and '.join(bounds)}{_or(other)}")
    return float(found)


def dropout_rate(options: Options, default: float) -> float:
    """The option dropout: a rate of at least 0 and below 1, else raises `TrialError`."""
    return number(options, "dropout", default, at_least=0, below=1)


def _is_number(found: object) -> bool:
    """Finite, and no truth value, which Python counts among the numbers."""
    if isinstance(found, bool) or not isinstance(found, Real):
        return False
    try:
        return math.isfinite(found)
    except OverflowError:  # a whole number with hundreds of digits
        return False


def _or(other: str) -> str:
    return f", or {other}" if other else ""
