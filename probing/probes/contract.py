"""What every probe promises, as checks that find out whether one keeps it.

The shipped probes pass them in the tests; `patchbank check` runs them on anybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from patchbank.pipeline.errors import told
from patchbank.probing.probes.base import Build, ProbeShape
from patchbank.probing.probes.bench import Bench, Broken, NotAsked
from patchbank.probing.probes.checks import CHECKS, Check

SHAPE = ProbeShape(dim=24, n_classes=3, n_prefix=1, grid=(4, 3))
"""What a probe is tried for: small, and no two sizes alike."""
Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """What became of one check; as that of an encoder."""

    name: str
    promise: str
    """What the probe has to keep, in one sentence."""
    outcome: Outcome
    found: str
    """What was found, or why the check was skipped."""
    expected: str = ""
    hint: str = ""
    """What usually is the cause, or what to do."""


def check_probe(
    build: Build,
    *,
    name: str,
    shape: ProbeShape = SHAPE,
    report: Callable[[CheckResult], None] | None = None,
) -> tuple[CheckResult, ...]:
    """Holds the probes that `build` makes for `shape` against the contract, on the CPU.

    `report` gets each result as it is known. A check that makes no sense without another one is
    skipped where that one failed.
    """
    bench, results = Bench(build, name, shape), dict[str, CheckResult]()
    for check in CHECKS:
        unmet = [one for one in check.needs if results[one].outcome != "passed"]
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
        return CheckResult(name, promise, "passed", check.run(bench))
    except Broken as broken:
        return CheckResult(name, promise, "failed", broken.found, broken.expected, broken.hint)
    except NotAsked as reason:
        return CheckResult(name, promise, "skipped", str(reason))
    except Exception as error:
        # Whatever a stranger's probe raises is a finding.
        said = told(error, bench.file)
        return CheckResult(name, promise, "failed", said, "no exception")
