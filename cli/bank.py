"""`patchbank bank`: looks at banks, proves them whole, joins, converts and removes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from patchbank.cli import catalogue, convert, share, sign, verify
from patchbank.cli.bars import phase
from patchbank.pipeline.errors import BankError, BankNotFound, PatchbankError

app = typer.Typer(
    help="Look at banks, share them, prove them whole, join, convert and remove them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
BankPath = Annotated[Path, typer.Argument(metavar="BANK", help="A bank's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Facts = dict[str, Any]
app.command("verify")(verify.verify)
app.command("merge")(convert.merge)
app.command("convert")(convert.convert)
app.command("push")(share.push)
app.command("pull")(share.pull)
app.command("sign")(sign.sign)
app.command("ls")(catalogue.list_banks)


@app.command()
def show(
    bank: Annotated[
        str, typer.Argument(metavar="BANK|URL", help="A bank's folder, or its address.")
    ],
    json_output: AsJson = False,
) -> None:
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
