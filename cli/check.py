"""`patchbank check`: whether an encoder or a probe keeps what others build on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from patchbank.cli.bars import Step, count_bar
from patchbank.cli.encoder_options import FrontEndConstants, Preset, Weights, parse_constants
from patchbank.pipeline.errors import EncoderError, TrialError

if TYPE_CHECKING:
    from patchbank.pipeline.encoders.contract import CheckResult
    from patchbank.probing.probes.contract import CheckResult as ProbeResult

    AnyResult = CheckResult | ProbeResult


def check(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py|NAME", help="An encoder or a probe: your own, or one by its name."
        ),
    ],
    weights: Weights = None,
    preset: Preset = None,
    frontend: FrontEndConstants = None,
    window_s: Annotated[
        float, typer.Option(min=0.01, help="Length of the clips to try, seconds.")
    ] = 10.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "cpu",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try an encoder (a file that has load) or a probe (a file that has build).

    An encoder: shapes, order, finite and repeatable tokens, no mixing within a batch. A probe:
    seeds, masks, no mixing of clips or trials; of the options only --json is for probes. Status 1
    where a check fails. docs/encoders.md and docs/probes.md explain each.
    """
    report = None if json_output else print_result
    if is_probe(reference):
        if weights or preset or frontend:
            raise typer.BadParameter(
                f"--weights, --preset and --frontend are for encoders; {reference} is a probe"
            )
        _conclude("probe", reference, _try_probe(reference, report), json_output=json_output)
        return

    from patchbank.pipeline.encoders import load_encoder
    from patchbank.pipeline.encoders.checks import ANOTHER_WINDOW, CHECKS
    from patchbank.pipeline.encoders.contract import check_encoder
    from patchbank.pipeline.environment import choose_device

    chosen, constants = choose_device(device), parse_constants(frontend)
    with count_bar("check", "checks") as progress:
        results = check_encoder(
            lambda: load_encoder(
                reference, weights=weights, device=chosen, preset=preset, frontend=constants
            ),
            reference=reference,
            window_s=window_s,
            device=chosen,
            report=counted(report, progress, len(CHECKS)),
        )
    refused = [result.found for result in results if result.hint == ANOTHER_WINDOW]
    blame = f"{refused[0]}; this says nothing of {reference}: {ANOTHER_WINDOW}" if refused else ""
    _conclude("encoder", reference, results, blame=blame, json_output=json_output)


def is_probe(reference: str) -> bool:
    """Whether a file has `build` and no `load`; or whether a name is no encoder's but a probe's."""
    if reference.endswith(".py"):
        names = _names_of(Path(reference).expanduser())
        return "build" in names and "load" not in names

    from patchbank.pipeline.encoders.discovery import is_known

    if is_known(reference):
        return False

    from patchbank.probing.probes import PROBES
    from patchbank.probing.probes.installed import installed_probes

    return reference in PROBES or reference in dict(installed_probes())


def counted(
    report: Callable[[AnyResult], None] | None, progress: Step, n_checks: int
) -> Callable[[AnyResult], None]:
    """`report` that also counts the results."""
    n_done = 0

    def told(result: AnyResult) -> None:
        nonlocal n_done
        n_done += 1
        progress(n_done, n_checks)
        if report is not None:
            report(result)

    return told


def _names_of(path: Path) -> set[str]:
    """What a file defines at its top level, without running it."""
    import ast

    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return set()  # told by whoever loads it
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(one.id for one in node.targets if isinstance(one, ast.Name))
    return names


def _try_probe(reference: str, report: Callable[[AnyResult], None] | None) -> tuple[AnyResult, ...]:
    from patchbank.probing.probes import find_build
    from patchbank.probing.probes.checks import CHECKS
    from patchbank.probing.probes.contract import check_probe

    name, build = find_build(reference)
    with count_bar("check", "checks") as progress:
        return check_probe(build, name=name, report=counted(report, progress, len(CHECKS)))


def _conclude(
    kind: Literal["encoder", "probe"],
    reference: str,
    results: Sequence[AnyResult],
    *,
    blame: str = "",
    json_output: bool,
) -> None:
    """Prints what came out; raises where a check failed, `blame` where it is not the checked's."""
    import json
    from dataclasses import asdict

    failed = [result.name for result in results if result.outcome == "failed"]
    if json_output:
        checks = [asdict(result) for result in results]
        print(json.dumps({kind: reference, "passed": not failed, "checks": checks}))
    error = EncoderError if kind == "encoder" else TrialError
    if blame:
        raise error(blame)
    if failed:
        use = "extract" if kind == "encoder" else "train"
        kept = "a bank" if kind == "encoder" else "every result"
        raise error(
            f"{reference} fails {len(failed)} of {len(results)} checks: {', '.join(failed)}; "
            f"repair it before you {use} with it, {kept} would keep the mistake"
        )
    if not json_output:
        print(f"{reference}: keeps the contract")


def print_result(result: AnyResult) -> None:
    """One check; a line where it passed, and what is wrong where it did not."""
    from patchbank.cli.listing import print_beside

    outcome = result.outcome if result.outcome != "failed" else "FAILED"
    told = result.found if result.outcome in ("passed", "skipped") else result.promise
    print_beside(f"{outcome:<8} {result.name:<12} ", told)
    if result.outcome in ("warning", "failed"):
        for name in ("found", "expected", "hint"):
            if text := getattr(result, name):
                print_beside(f"{'':9}{name:<12} ", text)
