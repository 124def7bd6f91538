"""What every encoder promises, as checks that find out whether one keeps it.

The shipped encoders pass them in the tests; `patchbank check` runs them on anybody's.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from patchbank.pipeline.encoders.base import Encoder
from patchbank.pipeline.encoders.bench import Bench, Broken, Doubtful, NotAsked
from patchbank.pipeline.encoders.checks import CHECKS, Check

Outcome = Literal["passed", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """What became of one check."""

    name: str
    promise: str
    """What the encoder has to keep, in one sentence."""
    outcome: Outcome
    found: str
    """What was found, or why the check was skipped."""
    expected: str = ""
    hint: str = ""
    """What usually is the cause, or what to do."""


def check_encoder(
    load: Callable[[], Encoder],
    *,
    reference: str = "",
    window_s: float = 10.0,
    device: torch.device | str = "cpu",
    report: Callable[[CheckResult], None] | None = None,
) -> tuple[CheckResult, ...]:
    """Holds what `load` returns, in evaluation mode on `device`, against the contract.

    `load` is called twice and raises what it likes. `reference` is how `load_encoder` finds the
    encoder; with it the check also sees whether the name in its spec leads back to it. Clips are
    `window_s` long; some thirty are encoded. `report` gets each result as it is known. A check
    that makes no sense without another one is skipped where that one failed.
    """
    bench = Bench(load, reference=reference, window_s=window_s, device=torch.device(device))
    results: dict[str, CheckResult] = {}
    for check in CHECKS:
        unmet = [name for name in check.needs if results[name].outcome in ("failed", "skipped")]
        if unmet:
            result = CheckResult(check.name, check.promise, "skipped", f"needs {unmet[0]}")
        else:
            result = _result(check, bench)
        results[check.name] = result
        if report is not None:
            report(result)
    return tuple(results.values())


def _result(check: Check, bench: Bench) -> CheckResult:
    name, promise = check.name, check.promise
    try:
        with torch.no_grad():
            return CheckResult(name, promise, "passed", check.run(bench))
    except Broken as broken:
        outcome: Outcome = "warning" if isinstance(broken, Doubtful) else "failed"
        return CheckResult(name, promise, outcome, broken.found, broken.expected, broken.hint)
    except NotAsked as reason:
        return CheckResult(name, promise, "skipped", str(reason))
    except Exception as error:
        # Whatever a stranger's encoder raises is a finding.
        return CheckResult(name, promise, "failed", _told(error), "no exception")


def _told(error: Exception) -> str:
    """What an error says and the line that led to it, not one inside a library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    frame = (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
