"""`patchbank bank`: looks at banks, proves them whole, joins, converts and removes them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from patchbank.cli import convert
from patchbank.cli.bars import byte_bar, phase
from patchbank.cli.encoder_options import Weights
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankError,
    BankMismatch,
    BankNotFound,
    PatchbankError,
)

app = typer.Typer(
    help="Look at banks, prove them whole, join, convert and remove them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
BankPath = Annotated[Path, typer.Argument(metavar="BANK", help="A bank's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Facts = dict[str, Any]
MOST_DIFFERENCES = 8
app.command("merge")(convert.merge)
app.command("convert")(convert.convert)


@app.command()
def verify(
    bank: BankPath,
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
    json_output: AsJson = False,
) -> None:
    """Check a bank against its seal and name every shard and row that differs.

    With --encoder, prove also that the encoder and its preprocessing, here, give the bank's tokens.
    """
    import json

    from patchbank.pipeline.bank.verify import verify_bank

    if weights is not None and encoder is None:
        raise typer.BadParameter("--weights are those of an encoder; name it with --encoder")
    with byte_bar("verify") as progress:
        problems = verify_bank(bank, quick=quick, progress=progress)
    golden: Facts = {}
    if encoder is not None and not problems:
        with phase("encode the golden clip"):
            disagreements, golden = golden_problems(bank, encoder, weights, device)
        if disagreements:
            if json_output:
                print(json.dumps({"bank": str(bank), "quick": quick, "problems": disagreements}))
            else:
                for problem in disagreements[:MOST_DIFFERENCES]:
                    print(problem)
                if (n_more := len(disagreements) - MOST_DIFFERENCES) > 0:
                    print(f"and {n_more} more; --json prints all")
            raise BankMismatch(
                f"{bank} was not made by this encoder as it is here: {len(disagreements)} "
                f"difference{'s' * (len(disagreements) > 1)}; use the weights and the versions "
                f"that `patchbank bank show {bank}` names",
                {},
            )
    if json_output:
        facts = {"bank": str(bank), "quick": quick, "problems": problems}
        print(json.dumps(facts | ({"golden": golden} if encoder is not None else {})))
    else:
        for problem in problems:
            print(problem)
    if problems:
        raise BankCorrupt(
            f"{bank}: {len(problems)} problem{'s' * (len(problems) > 1)} found; "
            f"pull the bank again, or `patchbank bank rm {bank}` and extract again"
        )
    if not json_output:
        print(f"{bank}: whole{', as far as a quick check sees' * quick}")
        for name, error in golden.items():
            print(f"golden clip, {name}: agrees, largest error {error:.1e} of the largest value")


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


@app.command()
def show(bank: BankPath, json_output: AsJson = False) -> None:
    """Say what a bank holds: encoder, layers, window, clips, failures, size, licence."""
    import json

    from patchbank.cli.bank_facts import bank_facts, print_fact, readable_facts
    from patchbank.pipeline.bank import open_bank

    with phase("read"):
        facts = bank_facts(open_bank(bank))
    if json_output:
        print(json.dumps(facts))
        return
    for name, value in readable_facts(facts):
        print_fact(name, value)


@app.command("ls")
def list_banks(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where banks lie.")] = Path(),
    json_output: AsJson = False,
) -> None:
    """List the banks directly below a folder; one that cannot be read is named with its reason."""
    import json

    if not folder.is_dir():
        raise PatchbankError(f"no folder {folder}; name the folder that holds the banks")
    with phase("read"):
        rows = [facts for path in sorted(folder.iterdir()) if (facts := summary(path)) is not None]
    if json_output:
        print(json.dumps(rows))
        return
    if not rows:
        print(f"no banks in {folder}; `patchbank extract` makes one")
    for facts in rows:
        print_summary(facts)


def summary(path: Path) -> Facts | None:
    """One line of `bank ls`; None for what does not look like a bank."""
    looks_like_a_bank = path.suffix == ".bank" or (path / "zarr.json").is_file()
    if path.name.startswith(".") or not path.is_dir() or not looks_like_a_bank:
        return None
    try:
        return _summary_of_bank(path)
    except BankNotFound as error:
        # A Zarr group of somebody else's, unless its name says that it should be a bank.
        return _unreadable(path, error) if path.suffix == ".bank" else None
    except (BankError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        return _unreadable(path, error)


def _unreadable(path: Path, error: Exception) -> Facts:
    known = isinstance(error, BankError | OSError)
    reason = str(error) if known else f"the card is damaged: {error!r}"
    return {"name": path.name, "error": reason}


def _summary_of_bank(path: Path) -> Facts:
    from patchbank.pipeline.bank.card import read_attributes
    from patchbank.pipeline.bank.seal_record import read_seal

    card = read_attributes(path)["card"]
    seal = read_seal(path) if (path / "seal.json").exists() else None
    return {
        "name": path.name,
        "encoder": card["encoder"]["name"],
        "layers": sorted(int(layer) for layer in card["layers"]),
        "dtype": card["stored_dtype"],
        "archive": card.get("storage") == "blosc",
        "pooled_only": card.get("storage") == "pooled",
        "clips": sum(card["generations"]),
        "bytes": seal.bank_bytes if seal else _bytes_so_far(path),
        "sealed": seal is not None,
        "fingerprint": seal.fingerprint if seal else None,
    }


def _bytes_so_far(path: Path) -> int:
    n_bytes = 0
    for file in path.rglob("*"):
        # An extraction that is running renames and removes files.
        with suppress(FileNotFoundError):
            n_bytes += 0 if file.is_dir() else file.lstat().st_size
    return n_bytes


def print_summary(facts: Facts) -> None:
    """One bank of `bank ls`."""
    from patchbank.pipeline.specs import human_bytes

    if "error" in facts:
        print(f"{facts['name']:<24} {facts['error']}")
        return
    layers = ",".join(str(layer) for layer in facts["layers"])
    state = facts["fingerprint"][:12] if facts["sealed"] else "not sealed"
    print(
        f"{facts['name']:<24} {state:<12} {facts['encoder']} {layers} {facts['dtype']}"
        f"{' archive' * facts['archive']}{' pooled only' * facts['pooled_only']}, "
        f"{facts['clips']} clips, {human_bytes(facts['bytes'])}"
    )


@app.command("rm")
def remove(
    bank: BankPath,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a bank, sealed or not; nothing that is no bank, no link, none that is being made."""
    import shutil
    import uuid

    from patchbank.pipeline.bank.commit import live_attempts
    from patchbank.pipeline.bank.growth import next_folder

    if bank.is_symlink():
        raise PatchbankError(f"{bank} is a link to {bank.readlink()}; remove the link with rm")
    n_clips = clips_to_remove(bank)
    if working := live_attempts(bank) | live_attempts(next_folder(bank)):
        raise PatchbankError(
            f"an extraction works on {bank} now ({len(working)} shards under way); stop it first"
        )
    if not yes:
        typer.confirm(f"Remove {bank} ({n_clips} clips)?", abort=True, err=True)
    # Renamed first: a removal that is cut short leaves nothing that looks like a bank.
    doomed = bank.absolute().with_name(f".{bank.absolute().name}.{uuid.uuid4().hex}")
    bank.absolute().rename(doomed)
    with phase("remove"):
        shutil.rmtree(doomed)
    print(f"removed {bank}")


def clips_to_remove(bank: Path) -> str:
    """How many clips a bank holds, for the question; `BankError` where it is none, not even one
    whose card is damaged."""
    from patchbank.pipeline.bank.card import read_attributes

    try:
        return str(sum(read_attributes(bank)["card"]["generations"]))
    except (BankError, KeyError, TypeError) as error:
        # What `verify` says to remove must be removable.
        if not ((bank / "commits").is_dir() and (bank / "layers").is_dir()):
            if isinstance(error, BankError):
                raise
            raise BankNotFound(f"{bank} is no bank") from error
        return "an unknown number of"
