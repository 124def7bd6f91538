"""`patchbank bank ls`: what banks there are in a folder, a bucket, on a server or a hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.cli.bars import count_bar
from patchbank.pipeline.errors import PatchbankError

if TYPE_CHECKING:
    from patchbank.pipeline.sharing.described import Row
    from patchbank.pipeline.sharing.entry import Entry
    from patchbank.pipeline.sharing.store import Store

Facts = dict[str, Any]
MOST_WITH_DETAILS = 50
"""Of more banks, one line each is printed."""
STATE_WIDTH, LINE = 13, 79
MOST_NAMED = 5
LONGEST_LICENCE = 24


@dataclass(frozen=True)
class Wanted:
    """Which banks of a listing are asked for; None asks for all."""

    encoder: str | None = None
    data: str | None = None
    layer: int | None = None
    dtype: str | None = None

    @property
    def is_everything(self) -> bool:
        return (self.encoder, self.data, self.layer, self.dtype) == (None, None, None, None)

    def has(self, row: Row) -> bool:
        """Whether a bank is one; what cannot be read is none, unless all are asked for."""
        entry = row.entry
        if entry is None or self.is_everything:
            return self.is_everything
        data = self.data and self.data.casefold()
        of_data = (
            data in entry.name.casefold()
            if entry.data is None and data
            else data == (entry.data or "").casefold()
        )
        return (
            (self.encoder is None or _same_encoder(self.encoder, entry.encoder))
            and (data is None or of_data)
            and (self.layer is None or self.layer in entry.layers)
            and (self.dtype is None or self.dtype == entry.dtype)
        )


def _same_encoder(one: str, other: str) -> bool:
    return one.casefold().removesuffix("+") == other.casefold().removesuffix("+")


def list_banks(
    place: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL|FOLDER]",
            help="Where banks lie; else the catalogue of the settings, or this folder.",
            show_default=False,
        ),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only banks of this encoder.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only of this data set, or with it in their names."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(metavar="N", help="Only banks that have this layer.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Only of this stored type: int8 ...")
    ] = None,
    signed_by: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only banks that this person signed."),
    ] = None,
    allowed_signers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Check signatures against this list of keys."),
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="First make the catalogue anew, from the banks.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the banks of a place; one that cannot be read is named with its reason."""
    import json

    from patchbank.pipeline.sharing import catalogue
    from patchbank.pipeline.sharing.listing import read_catalogue
    from patchbank.pipeline.sharing.settings import load_settings
    from patchbank.pipeline.sharing.stores import checked_place, is_url, open_store, safe_url

    settings = load_settings()
    place = checked_place((settings.catalogue or ".") if place is None else place)
    if not is_url(place) and not Path(place).is_dir():
        raise PatchbankError(f"no folder {place}; name the folder that holds the banks")
    banks = open_store(place)
    if rebuild:
        with count_bar("rebuild", "banks", vanishes=True) as step:
            catalogue.rebuild(banks, progress=step)
    with count_bar("read", "banks", vanishes=True) as step:
        rows = read_catalogue(banks, progress=step)
    there = rows
    wanted = Wanted(encoder, data, layer, dtype)
    rows = [row for row in rows if wanted.has(row)]
    allowed = allowed_signers or (settings.allowed_signers if signed_by else None)
    if allowed is not None:
        rows = [row for row in with_signers(banks, rows, allowed) if wanted.has(row)]
    if signed_by is not None:
        rows = [row for row in rows if row.entry and signed_by in row.entry.signed_by]
        if allowed is None:
            _say("who signed is only claimed here; --allowed-signers FILE checks it")
    if not (wanted.is_everything and signed_by is None):
        _say_unreadable(there)
    if json_output:
        print(json.dumps([facts_of(row) for row in rows]))
        return
    if not rows:
        if there:
            print(f"no banks like that in {safe_url(place)}")
        else:
            _print_none(banks, safe_url(place))
    print_rows(rows)
    if any(row.is_indexed for row in there):
        n_lacking = sum(not row.is_indexed for row in there)
        if n_lacking:
            _say(f"{n_lacking} not in the catalogue; `patchbank bank ls --rebuild` enters them")


def _print_none(banks: Store, place: str) -> None:
    """That there are no banks at a place, and where some may be."""
    from patchbank.cli.listing import print_beside
    from patchbank.pipeline.bank.damage import shown
    from patchbank.pipeline.sharing.listing import list_store

    names = list_store(banks).banks if banks.can_list else ()
    if not names:
        print(f"no banks in {place}; `patchbank extract` makes one")
        return
    print(f"no banks in {place}; only folders directly inside were looked at:")
    more = [f"and {len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    print_beside("    ", ", ".join([*map(shown, names[:MOST_NAMED]), *more]))


def _say(line: str) -> None:
    import sys

    print(line, file=sys.stderr)


def _say_unreadable(rows: Sequence[Row]) -> None:
    if n_lost := sum(row.entry is None for row in rows):
        _say(f"{n_lost} that cannot be read {'is' if n_lost == 1 else 'are'} left out")


def with_signers(banks: Store, rows: Sequence[Row], allowed: Path) -> list[Row]:
    """The rows as the seals of their banks prove them, signed by whom `allowed` names."""
    from patchbank.pipeline.sharing.listing import in_parallel_order
    from patchbank.pipeline.sharing.signers import checked_row

    with count_bar("check signatures", "banks", vanishes=True) as step:
        return in_parallel_order(lambda row: checked_row(banks, row, allowed), rows, step)


def facts_of(row: Row) -> Facts:
    """What `--json` says of a bank."""
    from dataclasses import asdict

    entry = row.entry
    if entry is None:
        return {"name": row.name, "error": row.problem, "indexed": row.is_indexed}
    facts = asdict(entry) | {
        "sealed": entry.is_sealed,
        "fingerprint": entry.fingerprint or None,
        "root_sha256": entry.root_sha256 or None,
        "indexed": row.is_indexed,
        "signatures_checked": row.is_checked,
    }
    return facts if row.problem is None else facts | {"warning": row.problem}


def print_rows(rows: Sequence[Row]) -> None:
    """A listing for a terminal of 80 columns."""
    from patchbank.pipeline.bank.damage import shown
    from patchbank.pipeline.specs import human_bytes

    names = max((len(shown(row.name)) for row in rows), default=0)
    longest = max((len(summary(row.entry)) for row in rows if row.entry), default=0)
    has_details = len(rows) <= MOST_WITH_DETAILS
    for row in rows:
        if names + 1 + STATE_WIDTH + longest <= LINE:
            _print_short(row, names, has_details=has_details)
        else:
            _print_long(row, min(names, LINE - 1 - longest), has_details=has_details)
    if not has_details:
        n_bytes = sum(row.entry.bytes for row in rows if row.entry)
        print(f"{len(rows)} banks, {human_bytes(n_bytes)}; --encoder, --data, --layer, --dtype and")
        print("--signed-by narrow the list, --json has all that is known")


def _print_short(row: Row, width: int, *, has_details: bool) -> None:
    """Name, fingerprint and summary on one line, further lines beside the name."""
    from patchbank.cli.listing import print_beside
    from patchbank.pipeline.bank.damage import shown

    lead, beside = f"{shown(row.name):<{width}} ", " " * (width + 1)
    if row.entry is not None:
        print_beside(f"{lead}{_state(row.entry):<{STATE_WIDTH - 1}} ", summary(row.entry))
        lead = beside
    if row.problem is not None:
        print_beside(lead, _one_line(row.problem))
    if row.entry is not None and has_details:
        print_beside(beside, details(row))


def _print_long(row: Row, width: int, *, has_details: bool) -> None:
    """Where names leave no room for the fingerprint beside them: it begins the second line."""
    from patchbank.cli.listing import print_beside
    from patchbank.pipeline.bank.damage import shown

    lead, below = f"{shown(row.name):<{width}} ", []
    if row.entry is not None and len(lead) == width + 1:
        print_beside(lead, summary(row.entry))
    else:
        print(lead.rstrip())
        below += [summary(row.entry)] if row.entry else []
    if row.entry is not None and (has_details or not row.entry.is_sealed):
        below.append(_state(row.entry))
    if row.entry is not None and has_details:
        below.append(details(row))
    for text in (", ".join(below), _one_line(row.problem or "")):
        if text:
            print_beside("    ", text)


def _state(entry: Entry) -> str:
    return entry.fingerprint[:12] if entry.is_sealed else "not sealed"


def _one_line(text: str) -> str:
    """A message that may quote what a stranger wrote."""
    from patchbank.pipeline.bank.damage import shown

    return shown(" ".join(text.split()))


def summary(entry: Entry) -> str:
    """What the tokens are, and how many."""
    from patchbank.pipeline.specs import human_bytes

    kind = " archive" * entry.archive + " pooled" * entry.pooled_only
    return (
        f"{entry.encoder} {readable_layers(entry.layers)} {entry.dtype}{kind}, "
        f"{entry.clips} clips, {human_bytes(entry.bytes)}"
    )


def details(row: Row) -> str:
    """Licence, data set, weights, date and who signed."""
    from patchbank.pipeline.bank.damage import shown

    entry = row.entry
    assert entry is not None
    licence = " ".join(entry.licence.split()) or "no licence stated"
    signers = ", ".join(entry.signed_by)
    return ", ".join(
        shown(part)
        for part in (
            licence if len(licence) <= LONGEST_LICENCE else f"{licence[:LONGEST_LICENCE]}...",
            entry.data or "",
            f"weights {entry.weights_sha256[:12]}" if entry.weights_sha256 else "",
            entry.pushed[:10] if entry.pushed else "",
            f"signed by {signers}{'' if row.is_checked else ' (unchecked)'}" if signers else "",
            "not signed" if row.is_checked and not signers else "",
        )
        if part
    )


def readable_layers(layers: Sequence[int]) -> str:
    """1,2,5-12: runs of three and more are ranges."""
    runs: list[list[int]] = [list(layers[:1])]
    for one, other in pairwise(layers):
        if other == one + 1:
            runs[-1].append(other)
        else:
            runs.append([other])
    return ",".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs
    )
