"""`patchbank bank push`: banks to other places; and what it has in common with `bank pull`."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.cli.bars import byte_bar, phase
from patchbank.pipeline.errors import PatchbankError

if TYPE_CHECKING:
    from patchbank.pipeline.bank import Bank
    from patchbank.pipeline.sharing.entry import Entry
    from patchbank.pipeline.sharing.push_plan import PushPlan
    from patchbank.pipeline.sharing.settings import ShareSettings
    from patchbank.pipeline.sharing.store import Store

Facts = dict[str, Any]
LEAST_BYTES_PER_S = 1_000
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LimitRate = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="At most so much a second, as 20MB. [default: no limit]"),
]


def push(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="A sealed bank's folder.")],
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="Of the bank (its name ends in .bank), or of the folder for it: a path, s3://, "
            "gs://, sftp://, hf://datasets/...",
        ),
    ],
    data: Annotated[
        str | None, typer.Option(metavar="NAME", help="The data set, for catalogue and card.")
    ] = None,
    data_licence: Annotated[
        str | None, typer.Option(metavar="LICENCE", help="Of the data set, for the card.")
    ] = None,
    limit_rate: LimitRate = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Prove every file that is there, and send damaged ones."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")
    ] = False,
    json_output: AsJson = False,
) -> None:
    """Put a bank where a team finds it; run again, it goes on, and sends only what is new.

    The seal goes last: until all has arrived, nobody takes it for a bank. Audio is never sent.
    """
    from patchbank.pipeline.bank import open_bank
    from patchbank.pipeline.sharing.licence import licence_warnings
    from patchbank.pipeline.sharing.notes import CARD
    from patchbank.pipeline.sharing.push import push_bank
    from patchbank.pipeline.sharing.push_plan import plan_push
    from patchbank.pipeline.sharing.push_record import PushRecord
    from patchbank.pipeline.sharing.settings import load_settings
    from patchbank.pipeline.sharing.stores import open_store, split_place

    limit = byte_limit(limit_rate)
    settings = load_settings()
    with phase("open"):
        opened = open_bank(bank)
    place = place_in(url, opened.path.resolve().name)
    split_place(place)  # refuses the root of a bucket before anything is asked of it
    store = open_store(place)
    record = PushRecord.of(settings.cache, store.url, opened.root_sha256)
    with byte_bar("compare") as compared:
        plan = plan_push(opened, store, record, repair=repair, progress=compared)
    claims = _claims(opened, place, plan, Claims(data, data_licence, _signers(opened, settings)))
    for line in licence_warnings(opened, data_licence=claims.data_licence):
        print(f"note: {line}", file=sys.stderr)
    facts: Facts = {
        "bank": str(opened.path),
        "url": store.url,
        "fingerprint": opened.fingerprint,
        "root_sha256": opened.root_sha256,
        "files": len(plan.send) + len(plan.replace),
        "bytes": plan.n_bytes,
        "was_there": plan.is_done,
    }
    if dry_run:
        say_facts({**facts, "dry_run": True}, push_line(facts, "to send"), json_output)
        return
    if plan.root_sha256 is not None and not plan.is_same:
        _withdraw(place)
    notes = {CARD: _card(opened, store, place, claims)}
    with byte_bar("push") as progress:
        push_bank(
            opened,
            store,
            record=record,
            notes=notes,
            renew_notes=data is not None or data_licence is not None,
            plan=plan,
            limit_bytes_per_s=limit,
            progress=progress,
        )
    with phase("catalogue"):
        _enter(opened, place, claims)
    say_facts(facts, push_line(facts, "sent"), json_output)


@dataclass(frozen=True)
class Claims:
    """What only who pushes knows of a bank."""

    data: str | None = None
    data_licence: str | None = None
    signed_by: tuple[str, ...] = ()


def _claims(bank: Bank, place: str, plan: PushPlan, given: Claims) -> Claims:
    """What is said now, and where nothing is, what was at an earlier push of the same bank; of one
    that has grown, signatures aside: they were for another seal."""
    from patchbank.pipeline.sharing.catalogue import entries_of
    from patchbank.pipeline.sharing.stores import open_store, split_place

    folder, name = split_place(place)
    earlier: dict[str, Entry] = {}
    with suppress(PatchbankError):  # what is wrong with the catalogue, `_enter` says
        earlier = {entry.root_sha256: entry for entry in entries_of(open_store(folder), name)}
    same = earlier.get(bank.root_sha256)
    old = same or (None if plan.root_sha256 is None else earlier.get(plan.root_sha256))
    return Claims(
        given.data or (old.data if old else None),
        given.data_licence or (old.data_licence if old else None),
        given.signed_by or (same.signed_by if same else ()),
    )


def _card(bank: Bank, store: Store, place: str, claims: Claims) -> bytes:
    from patchbank.pipeline.sharing.dataset_card import dataset_card
    from patchbank.pipeline.sharing.stores import split_place

    card = dataset_card(
        bank,
        name=split_place(place)[1],
        data=claims.data,
        data_licence=claims.data_licence,
        url=store.url,
    )
    return card.encode()


def _enter(bank: Bank, place: str, claims: Claims) -> None:
    """Enters a bank into the catalogue of its folder; a team may not let everybody write there, and
    a place may be none that has a folder above."""
    from patchbank.pipeline.sharing.catalogue import enter
    from patchbank.pipeline.sharing.entry import entry_of
    from patchbank.pipeline.sharing.stores import open_store, split_place

    folder, name = split_place(place)
    try:
        enter(open_store(folder), name, entry_of(bank, name=name, **vars(claims)))
    except (PatchbankError, ValueError) as error:
        print(f"note: pushed, but not entered into the catalogue: {error}", file=sys.stderr)


def _withdraw(place: str) -> None:
    """Takes the entry of a bank away that is about to grow: killed now, the old one would stay."""
    from patchbank.pipeline.sharing.catalogue import withdraw
    from patchbank.pipeline.sharing.stores import open_store, split_place

    folder, name = split_place(place)
    with suppress(PatchbankError):
        withdraw(open_store(folder), name)


def _signers(bank: Bank, settings: ShareSettings) -> tuple[str, ...]:
    """Who signed, by name where we know the key, else by key."""
    from patchbank.pipeline.bank.seal_record import seal_bytes
    from patchbank.pipeline.sharing.folder_store import FolderStore
    from patchbank.pipeline.sharing.trust import read_signatures, verdicts

    signatures = read_signatures(FolderStore(bank.path))
    found = verdicts(seal_bytes(bank.path) or b"", signatures, allowed=settings.allowed_signers)
    return tuple(v.signer or v.key for v in found if v.state in ("trusted", "unknown key"))


def place_in(url: str, name: str) -> str:
    """Where a bank goes: the address itself where it names a bank, else below it."""
    from patchbank.pipeline.sharing.stores import bank_place, checked_place, is_url

    place = checked_place(url)
    path = place.split("?", 1)[0] if is_url(place) else place
    if path.endswith(".bank"):
        return place
    if path.rstrip("/").endswith(".bank"):
        return place.rstrip("/")
    return bank_place(place, name)


def byte_limit(text: str | None) -> int | None:
    """--limit-rate as bytes a second."""
    from patchbank.pipeline.sharing.settings import parse_bytes

    limit = None if text is None else parse_bytes(text)
    if limit is not None and limit < LEAST_BYTES_PER_S:
        raise PatchbankError(
            f"--limit-rate {text} is less than 1 kB a second; write more, such as 20MB, or leave "
            "it out for no limit"
        )
    return limit


def push_line(facts: Facts, verb: str) -> str:
    """What a push did, in a line."""
    from patchbank.pipeline.specs import human_bytes

    if facts["was_there"]:
        return f"{facts['url']}: is there already, {facts['fingerprint'][:12]}"
    size = human_bytes(facts["bytes"])
    return f"{facts['url']}: {facts['files']} files, {size} {verb}, {facts['fingerprint'][:12]}"


def say_facts(facts: Facts, line: str, json_output: bool) -> None:
    """The result, on stdout."""
    import json

    print(json.dumps(facts) if json_output else line)
