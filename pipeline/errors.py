"""Every error that patchbank raises on purpose.

A message says what was found, what was expected, and the next command to type. The command line
prints it without a traceback and leaves with status 1.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOST_DIFFERENCES, LONGEST_VALUE = 20, 500


class PatchbankError(Exception):
    """Root of all errors raised on purpose."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a table, where a person can find it."""

    file: str
    line: int | None
    column: str | None
    message: str

    def __str__(self) -> str:
        place = self.file
        if self.line is not None:
            place += f":{self.line}"
        if self.column is not None:
            place += f":{self.column}"
        return f"{place}: {self.message}"


class ManifestError(PatchbankError):
    """A clip table, label table or split table is wrong; `problems` lists where.

    The message prints the first `shown` problems, one a line, and counts the others.
    """

    def __init__(self, problems: Sequence[Problem], *, shown: int = 20) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:shown]]
        if len(self.problems) > shown:
            lines.append(f"... and {len(self.problems) - shown} more")
        super().__init__("\n".join(lines))


class AudioError(PatchbankError):
    """A clip cannot be decoded, is empty, or holds values that are no audio."""


class EncoderError(PatchbankError):
    """An encoder is unknown, its weights are missing or do not fit it."""


class BankError(PatchbankError):
    """Root of everything that can be wrong with a bank."""


class BankNotFound(BankError):
    """There is no bank at that place."""


class BankIncomplete(BankError):
    """The bank has no seal: its extraction has not finished."""


class BankMismatch(BankError):
    """Two things that must agree do not; `differences` maps a field to (found, expected)."""

    def __init__(self, message: str, differences: Mapping[str, tuple[object, object]]) -> None:
        self.differences = dict(differences)
        lines = [message]
        for field, values in list(self.differences.items())[:MOST_DIFFERENCES]:
            # A stranger's card names fields and values.
            found, expected = (repr(value)[:LONGEST_VALUE] for value in values)
            name = field if field.isprintable() else ascii(field)
            lines.append(f"  {name[:LONGEST_VALUE]}: found {found}, expected {expected}")
        if len(self.differences) > MOST_DIFFERENCES:
            lines.append(f"  and {len(self.differences) - MOST_DIFFERENCES} more")
        super().__init__("\n".join(lines))


class BankCorrupt(BankError):
    """Bytes of a bank are not what its records say; the message names shard and row."""


class StoreError(PatchbankError):
    """A folder, bucket, server or hub did not do what it was asked; `may_pass` where a retry may
    help: a cut connection, a busy server, fewer bytes than promised."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        self.may_pass = may_pass
        super().__init__(message)


class NotInStore(StoreError):
    """A store has no such file."""


class TrialError(PatchbankError):
    """A probe cannot be trained or applied as asked."""


class TrialDataError(TrialError, ValueError):
    """x or y are not what a classifier takes; scikit-learn expects a ValueError of that."""


def place_in(file: str | None, error: BaseException) -> str | None:
    """The deepest line of `file` that an error came through, as `file:line`."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    return f"{file}:{lines[-1]}" if lines else None


def told(error: BaseException, file: str | None = None) -> str:
    """What a stranger's error says, after the deepest line of `file` that it came through."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    said = f"{type(error).__name__}: {error}"
    place = place_in(file, error)
    return f"{place}: {said}" if place else said
