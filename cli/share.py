"""`patchbank bank push` and `bank pull`: banks to other places, and from them."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.cli.bars import byte_bar, phase
from patchbank.cli.choices import StoredDType
from patchbank.pipeline.errors import PatchbankError

if TYPE_CHECKING:
    from patchbank.pipeline.bank import Bank
    from patchbank.pipeline.sharing.settings import ShareSettings
    from patchbank.pipeline.sharing.store import Store

Facts = dict[str, Any]
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
    from patchbank.pipeline.sharing.settings import load_settings, parse_bytes
    from patchbank.pipeline.sharing.stores import open_store

    limit = None if limit_rate is None else parse_bytes(limit_rate)
    settings = load_settings()
    with phase("open"):
        opened = open_bank(bank)
    for line in licence_warnings(opened, data_licence=data_licence):
        print(f"note: {line}", file=sys.stderr)
    place = place_in(url, opened.path.resolve().name)
    store = open_store(place)
    record = PushRecord.of(settings.cache, store.url, opened.root_sha256)
    with byte_bar("compare") as compared:
        plan = plan_push(opened, store, record, progress=compared)
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
    if plan.there is not None and not plan.is_done:
        _withdraw(place)
    notes = {CARD: _card(opened, store, place, data, data_licence)}
    with byte_bar("push") as progress:
        push_bank(
            opened,
            store,
            record=record,
            notes=notes,
            plan=plan,
            limit_bytes_per_s=limit,
            progress=progress,
        )
    with phase("catalogue"):
        _enter(opened, place, data, settings)
    say_facts(facts, push_line(facts, "sent"), json_output)


def _card(
    bank: Bank, store: Store, place: str, data: str | None, data_licence: str | None
) -> bytes:
    from patchbank.pipeline.sharing.dataset_card import dataset_card
    from patchbank.pipeline.sharing.stores import split_place

    name = split_place(place)[1]
    card = dataset_card(bank, name=name, data=data, data_licence=data_licence, url=store.url)
    return card.encode()


def _enter(bank: Bank, place: str, data: str | None, settings: ShareSettings) -> None:
    """Enters a bank into the catalogue of its folder; a team may not let everybody write there."""
    from patchbank.pipeline.sharing.catalogue import enter
    from patchbank.pipeline.sharing.entry import entry_of
    from patchbank.pipeline.sharing.stores import open_store, split_place

    folder, name = split_place(place)
    try:
        entry = entry_of(bank, name=name, data=data, signed_by=_claims(bank, settings))
        enter(open_store(folder), name, entry)
    except (PatchbankError, ValueError) as error:
        print(f"note: pushed, but not entered into the catalogue: {error}", file=sys.stderr)


def _withdraw(place: str) -> None:
    """Takes the entry of a bank away that is about to grow: killed now, the old one would stay."""
    from patchbank.pipeline.sharing.catalogue import withdraw
    from patchbank.pipeline.sharing.stores import open_store, split_place

    folder, name = split_place(place)
    with suppress(PatchbankError):
        withdraw(open_store(folder), name)


def _claims(bank: Bank, settings: ShareSettings) -> tuple[str, ...]:
    """Who signed, by name where we know the key, else by key."""
    from patchbank.pipeline.bank.seal_record import seal_bytes
    from patchbank.pipeline.sharing.folder_store import FolderStore
    from patchbank.pipeline.sharing.trust import read_signatures, verdicts

    signatures = read_signatures(FolderStore(bank.path))
    found = verdicts(seal_bytes(bank.path) or b"", signatures, allowed=settings.allowed_signers)
    return tuple(v.signer or v.key for v in found if v.state in ("trusted", "unknown key"))


def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="URL|NAME", help="A bank's address or folder, or its name in a catalogue."
        ),
    ],
    dest: Annotated[
        str | None,
        typer.Argument(
            metavar="DEST",
            help="The bank to make (its name ends in .bank), or the folder for it. [default: here]",
        ),
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Only clips of this split; repeat it for several.")
    ] = None,
    layers: Annotated[str, typer.Option(help="all, last, or 1-based layers: 3,6,12.")] = "all",
    clips: Annotated[
        Path | None,
        typer.Option(help="Only these: a table with clip_id or path, and view if not all views."),
    ] = None,
    pooled_only: Annotated[
        bool, typer.Option("--pooled-only", help="Mean, max and min of each clip; no tokens.")
    ] = False,
    dtype: Annotated[
        StoredDType | None,
        typer.Option(help="Store as this type: saves disk here, no transfer."),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="URL", help="The catalogue that has NAME. [default: the settings']"
        ),
    ] = None,
    allowed_signers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Refuse a bank that no key of this file has signed."),
    ] = None,
    limit_rate: LimitRate = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would travel, and fetch nothing.")
    ] = False,
    json_output: AsJson = False,
) -> None:
    """Fetch a bank, or a part of one that is a bank itself; run again, it goes on.

    Every file is checked against the seal before it is put in place.
    """
    from patchbank.pipeline.sharing.settings import load_settings, parse_bytes, require_signers
    from patchbank.pipeline.sharing.stores import is_url, split_place

    limit = None if limit_rate is None else parse_bytes(limit_rate)
    if allowed_signers is not None:
        require_signers(allowed_signers)
    settings = load_settings()
    place = source
    if from_ is not None or not (is_url(source) or Path(source).exists()):
        from patchbank.pipeline.sharing.catalogue import find

        with phase("catalogue"):
            place = find(source, settings, from_)
    out = destination(dest, split_place(place)[1])
    chosen = Part(layers, tuple(split or ()), clips, dtype, pooled_only)
    pulling = _Pull(place, out, limit, settings)
    if chosen.is_whole:
        facts = pulling.whole(dry_run=dry_run)
    else:
        facts = pulling.part(chosen, dry_run=dry_run)
    verb = "to fetch" if dry_run else "fetched"
    say_facts({**facts, "dry_run": dry_run}, pull_line(facts, verb), json_output)


@dataclass(frozen=True)
class Part:
    """What of a bank is wanted."""

    layers: str
    splits: tuple[str, ...]
    clips: Path | None
    dtype: StoredDType | None
    pooled_only: bool

    @property
    def is_whole(self) -> bool:
        few = self.splits or self.clips or self.dtype or self.pooled_only
        return self.layers == "all" and not few

    @property
    def options(self) -> Facts:
        """As `pull_part` takes them."""
        return {
            "layers": self.layers,
            "splits": self.splits,
            "clips": self.clips,
            "dtype": None if self.dtype is None else self.dtype.value,
            "pooled_only": self.pooled_only,
        }


@dataclass(frozen=True)
class _Pull:
    place: str
    out: Path
    limit: int | None
    settings: ShareSettings

    def whole(self, *, dry_run: bool) -> Facts:
        from patchbank.pipeline.sharing.pull import plan_pull, pull_bank
        from patchbank.pipeline.sharing.remote_seal import read_remote_seal
        from patchbank.pipeline.sharing.stores import open_store
        from patchbank.pipeline.sharing.trust import check_trust, read_signatures

        store = open_store(self.place)
        with phase("look"):
            there = read_remote_seal(store)
            who = check_trust(
                there.content, read_signatures(store), where=store.url, settings=self.settings
            )
            plan = plan_pull(store, self.out, there)
        facts = {
            "url": store.url,
            "bank": str(self.out),
            "clips": there.schema.n_clips,
            "fingerprint": there.seal.fingerprint,
            "root_sha256": there.seal.root_sha256,
            "signed_by": list(who),
            "bytes": plan.n_bytes,
            "was_there": plan.is_done,
        }
        if not dry_run:
            with byte_bar("pull") as progress:
                pull_bank(
                    store,
                    self.out,
                    there=there,
                    limit_bytes_per_s=self.limit,
                    progress=progress,
                    say=lambda line: print(line, file=sys.stderr),
                )
        return facts

    def part(self, chosen: Part, *, dry_run: bool) -> Facts:
        from patchbank.pipeline.sharing.partial import part_bytes, pull_part
        from patchbank.pipeline.sharing.stores import safe_url

        with phase("look"):
            planned = part_bytes(self.place, **chosen.options)
        facts: Facts = {
            "url": safe_url(self.place),
            "bank": str(self.out),
            "clips": planned.schema.n_clips,
            "bytes": planned.travel_bytes,
            "disk_bytes": planned.disk_bytes,
        }
        if dry_run:
            return facts
        with byte_bar("pull") as progress:
            made = pull_part(
                self.place,
                self.out,
                **chosen.options,
                limit_bytes_per_s=self.limit,
                progress=progress,
                say=lambda line: print(line, file=sys.stderr),
            )
        return facts | {"fingerprint": made.fingerprint, "root_sha256": made.root_sha256}


def place_in(url: str, name: str) -> str:
    """Where a bank goes: the address itself where it names a bank, else below it."""
    from patchbank.pipeline.sharing.stores import is_url

    path = url.split("?", 1)[0] if is_url(url) else url
    if path.endswith(".bank"):
        return url
    if path.rstrip("/").endswith(".bank"):
        return url.rstrip("/")
    return f"{url.rstrip('/')}/{name}"


def destination(dest: str | None, name: str) -> Path:
    """The folder that a pull makes."""
    if not name or name in (".", "..") or name.startswith("-"):
        raise PatchbankError(f"the address names no bank ({name!r}); write it with its name")
    if dest is None:
        return Path(name)
    return Path(dest) if dest.rstrip("/").endswith(".bank") else Path(dest) / name


def push_line(facts: Facts, verb: str) -> str:
    """What a push did, in a line."""
    from patchbank.pipeline.specs import human_bytes

    if facts["was_there"]:
        return f"{facts['url']}: is there already, {facts['fingerprint'][:12]}"
    size = human_bytes(facts["bytes"])
    return f"{facts['url']}: {facts['files']} files, {size} {verb}, {facts['fingerprint'][:12]}"


def pull_line(facts: Facts, verb: str) -> str:
    """What a pull did, in a line."""
    from patchbank.pipeline.specs import human_bytes

    if facts.get("was_there"):
        return f"{facts['bank']}: is here already, {facts['fingerprint'][:12]}"
    signed = f", signed by {', '.join(facts['signed_by'])}" if facts.get("signed_by") else ""
    fingerprint = f", {facts['fingerprint'][:12]}" if "fingerprint" in facts else ""
    size = human_bytes(facts["bytes"])
    disk = f", {human_bytes(facts['disk_bytes'])} here" if "disk_bytes" in facts else ""
    return f"{facts['bank']}: {facts['clips']} clips, {size} {verb}{disk}{fingerprint}{signed}"


def say_facts(facts: Facts, line: str, json_output: bool) -> None:
    """The result, on stdout."""
    import json

    print(json.dumps(facts) if json_output else line)
