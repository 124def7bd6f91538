"""`patchbank bank verify`: proves a bank whole, made by an encoder, and signed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.cli.bars import byte_bar, count_bar, phase
from patchbank.cli.encoder_options import Weights
from patchbank.pipeline.errors import BankCorrupt, BankMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patchbank.pipeline.sharing.signing import Verdict

Facts = dict[str, Any]
MOST_DIFFERENCES = 8


def verify(
    bank: Annotated[str, typer.Argument(metavar="BANK", help="A bank's folder, or its URL.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Sizes, records and indices only; reads no tokens.")
    ] = False,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.py",
            help="Also encode the golden clip with this encoder and compare.",
        ),
    ] = None,
    weights: Weights = None,
    device: Annotated[str, typer.Option(help="For --encoder: auto, cpu, cuda ...")] = "auto",
    allowed_signers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also require a signature by one of these keys, see ssh-keygen(1)."
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a bank against its seal and name every shard and row that differs.

    With --encoder, prove also that the encoder and its preprocessing, here, give the bank's tokens.
    Of a URL, only the seal, the card, sizes and signatures are checked.
    """
    from patchbank.pipeline.sharing.stores import checked_place, is_url

    if weights is not None and encoder is None:
        raise typer.BadParameter("--weights are those of an encoder; name it with --encoder")
    bank = checked_place(bank)
    if is_url(bank):
        if encoder is not None:
            raise typer.BadParameter("--encoder needs the bank on this disk: pull it first")
        verify_at_url(bank, allowed_signers, json_output=json_output)
        return
    verify_here(
        Path(bank), quick, encoder, weights, device, allowed_signers, json_output=json_output
    )


def verify_here(
    bank: Path,
    quick: bool,
    encoder: str | None,
    weights: str | None,
    device: str,
    allowed: Path | None,
    *,
    json_output: bool,
) -> None:
    """A bank of this disk."""
    from patchbank.pipeline.bank.verify import verify_bank

    with byte_bar("verify") as progress:
        problems = verify_bank(bank, quick=quick, progress=progress)
    golden: Facts = {}
    if encoder is not None and not problems:
        with phase("encode the golden clip"):
            disagreements, golden = golden_problems(bank, encoder, weights, device)
        if disagreements:
            tell_disagreements(bank, disagreements, quick=quick, json_output=json_output)
    found = verdicts_of(str(bank), allowed) if (bank / "seal.json").is_file() else ()
    if json_output:
        facts: Facts = {"bank": str(bank), "quick": quick, "problems": problems}
        facts |= {"golden": golden} if encoder is not None else {}
        print(json.dumps(facts | signature_facts(found, allowed)))
    else:
        print_lines(problems)
    if problems:
        raise BankCorrupt(
            f"{bank}: {len(problems)} problem{'s' * (len(problems) > 1)} found; "
            f"pull the bank again, or `patchbank bank rm {bank}` and extract again"
        )
    if not json_output:
        print(f"{bank}: whole{', as far as a quick check sees' * quick}")
        for name, error in golden.items():
            print(f"golden clip, {name}: agrees, largest error {error:.1e} of the largest value")
        print_verdicts(found)
    require(found, str(bank), allowed)


def verify_at_url(url: str, allowed: Path | None, *, json_output: bool) -> None:
    """A bank at a store, as far as that can be without its tokens."""
    from patchbank.pipeline.sharing.store_check import check_store
    from patchbank.pipeline.sharing.stores import open_store

    store = open_store(url)
    with count_bar("verify", "files", vanishes=True) as progress:
        problems = check_store(store, progress=progress)
    found = () if problems else verdicts_of(url, allowed)
    if json_output:
        facts: Facts = {"bank": store.url, "quick": True, "problems": problems}
        print(json.dumps(facts | signature_facts(found, allowed)))
    else:
        print_lines(problems)
    if problems:
        raise BankCorrupt(
            f"{store.url}: {len(problems)} problem{'s' * (len(problems) > 1)} found; push it again"
        )
    if not json_output:
        print(f"{store.url}: seal, card and sizes are right; tokens were not read: pull the bank")
        print_verdicts(found)
    require(found, store.url, allowed)


def verdicts_of(bank: str, allowed: Path | None) -> tuple[Verdict, ...]:
    """What is known of a bank's signatures, compared with `allowed`, or with the settings' file."""
    from patchbank.pipeline.sharing.settings import load_settings
    from patchbank.pipeline.sharing.stores import open_store
    from patchbank.pipeline.sharing.trust import read_seal_at, read_signatures, verdicts

    store = open_store(bank)
    signatures = read_signatures(store)
    if signatures is None and allowed is None:
        return ()
    trusted = allowed or load_settings().allowed_signers
    return verdicts(read_seal_at(store), signatures, allowed=trusted)


def require(found: Sequence[Verdict], where: str, allowed: Path | None) -> None:
    """Raises `BankError` where a signature is wanted on the command line, and there is none."""
    from patchbank.pipeline.sharing.trust import require_trusted

    if allowed is not None:
        require_trusted(found, where=where, allowed=allowed)


def signature_facts(found: Sequence[Verdict], allowed: Path | None) -> Facts:
    """What --json says of signatures: nothing where there are none and none were asked for."""
    if not found and allowed is None:
        return {}
    return {"signatures": [asdict(verdict) for verdict in found]}


def print_verdicts(found: Sequence[Verdict]) -> None:
    """What is known of each signature, and its key below."""
    for verdict in found:
        print(verdict.says, *([f"  {verdict.key}"] if verdict.key else []), sep="\n")


def print_lines(lines: Sequence[str]) -> None:
    """One a line."""
    for line in lines:
        print(line)


def tell_disagreements(
    bank: Path, disagreements: Sequence[str], *, quick: bool, json_output: bool
) -> None:
    """Prints where an encoder gives other tokens, and raises `BankMismatch`."""
    if json_output:
        print(json.dumps({"bank": str(bank), "quick": quick, "problems": disagreements}))
    else:
        print_lines(disagreements[:MOST_DIFFERENCES])
        if (n_more := len(disagreements) - MOST_DIFFERENCES) > 0:
            print(f"and {n_more} more; --json prints all")
    raise BankMismatch(
        f"{bank} was not made by this encoder as it is here: {len(disagreements)} "
        f"difference{'s' * (len(disagreements) > 1)}; use the weights and the versions "
        f"that `patchbank bank show {bank}` names",
        {},
    )


def golden_problems(
    bank: Path, encoder: str, weights: str | None, device: str
) -> tuple[tuple[str, ...], Facts]:
    """Where an encoder disagrees with the golden clip of a bank, and the errors of every step."""
    from patchbank.pipeline.bank import open_bank
    from patchbank.pipeline.encoders import load_encoder, reload_encoder
    from patchbank.pipeline.encoders.discovery import is_file
    from patchbank.pipeline.environment import choose_device
    from patchbank.pipeline.golden import check_golden

    opened, chosen = open_bank(bank), choose_device(device)
    described = opened.card["encoder"]
    if is_file(encoder) or encoder.removesuffix("+") == described["name"].removesuffix("+"):
        # With the constants that were chosen for the bank's front end.
        model = reload_encoder(described, weights=weights, device=chosen, encoder=encoder)
    else:
        model = load_encoder(encoder, weights=weights, device=chosen)
    check = check_golden(opened, model, device=chosen)
    return check.problems, dict(check.errors)
