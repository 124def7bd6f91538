"""`patchbank bank`: looks at banks, proves them whole, joins, converts and removes them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from patchbank.cli import catalogue, convert, garbage, pull, share, sign, verify
from patchbank.cli.bars import phase

app = typer.Typer(
    help="Look at banks, share them, prove them whole, join, convert and remove them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Facts = dict[str, Any]
app.command("verify")(verify.verify)
app.command("merge")(convert.merge)
app.command("convert")(convert.convert)
app.command("push")(share.push)
app.command("pull")(pull.pull)
app.command("sign")(sign.sign)
app.command("ls")(catalogue.list_banks)
app.command("pin")(garbage.pin)
app.command("rm")(garbage.remove)
app.command("gc")(garbage.collect)


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
