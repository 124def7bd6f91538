"""`patchbank check`: whether an encoder keeps what a bank builds on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from patchbank.cli.encoder_options import FrontEndConstants, Preset, Weights, parse_constants
from patchbank.pipeline.errors import EncoderError

if TYPE_CHECKING:
    from patchbank.pipeline.encoders.contract import CheckResult


def check(
    encoder: Annotated[
        str,
        typer.Argument(metavar="FILE.py|NAME", help="An encoder of your own, or one by its name."),
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
    """Try an encoder: shapes, order, finite and repeatable tokens, no mixing within a batch.

    Status 1 where a check fails. docs/encoders.md explains each.
    """
    import json
    from dataclasses import asdict

    from patchbank.pipeline.encoders import load_encoder
    from patchbank.pipeline.encoders.checks import ANOTHER_WINDOW
    from patchbank.pipeline.encoders.contract import check_encoder
    from patchbank.pipeline.environment import choose_device

    chosen, constants = choose_device(device), parse_constants(frontend)
    results = check_encoder(
        lambda: load_encoder(
            encoder, weights=weights, device=chosen, preset=preset, frontend=constants
        ),
        reference=encoder,
        window_s=window_s,
        device=chosen,
        report=None if json_output else print_result,
    )
    failed = [result.name for result in results if result.outcome == "failed"]
    if json_output:
        checks = [asdict(result) for result in results]
        print(json.dumps({"encoder": encoder, "passed": not failed, "checks": checks}))
    refused = [result for result in results if result.hint == ANOTHER_WINDOW]
    if refused:
        raise EncoderError(f"{refused[0].found}; this says nothing of {encoder}: {ANOTHER_WINDOW}")
    if failed:
        raise EncoderError(
            f"{encoder} fails {len(failed)} of {len(results)} checks: {', '.join(failed)}; repair "
            "it before you extract with it, a bank would keep the mistake"
        )
    if not json_output:
        print(f"{encoder}: keeps the contract")


def print_result(result: CheckResult) -> None:
    """One check; a line where it passed, and what is wrong where it did not."""
    from patchbank.cli.listing import print_beside

    outcome = result.outcome if result.outcome != "failed" else "FAILED"
    told = result.found if result.outcome in ("passed", "skipped") else result.promise
    print_beside(f"{outcome:<8} {result.name:<12} ", told)
    if result.outcome in ("warning", "failed"):
        for name in ("found", "expected", "hint"):
            if text := getattr(result, name):
                print_beside(f"{'':9}{name:<12} ", text)
