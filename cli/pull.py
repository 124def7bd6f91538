"""`patchbank bank pull`: banks from other places, whole or in part."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchbank.cli.bars import byte_bar, phase
from patchbank.cli.choices import StoredDType
from patchbank.cli.share import AsJson, Facts, LimitRate, byte_limit, say_facts
from patchbank.pipeline.errors import PatchbankError

if TYPE_CHECKING:
    from patchbank.pipeline.sharing.catalogue import Found
    from patchbank.pipeline.sharing.remote_seal import RemoteSeal
    from patchbank.pipeline.sharing.settings import ShareSettings


def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="URL|NAME",
            help="A bank's address, or its name in a catalogue; or its folder, as ./x.bank.",
        ),
    ],
    dest: Annotated[
        str | None,
        typer.Argument(
            metavar="DEST",
            help="The bank to make (its name ends in .bank), or the folder for it. [default: "
            "here; a part is named after its options, as x.train.bank]",
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
    from patchbank.pipeline.sharing.settings import load_settings, require_signers
    from patchbank.pipeline.sharing.stores import split_place

    limit = byte_limit(limit_rate)
    if allowed_signers is not None:
        require_signers(allowed_signers)
    settings = load_settings()
    chosen = Part(layers, tuple(split or ()), clips, dtype, pooled_only)
    place, found = _source(source, settings, from_)
    out = destination(dest, chosen.name_of(split_place(place)[1]))
    _refuse_itself(place, out)
    pulling = _Pull(place, out, limit, settings, found)
    if chosen.is_whole:
        facts = pulling.whole(dry_run=dry_run)
    else:
        facts = pulling.part(chosen, dry_run=dry_run)
    verb = "to fetch" if dry_run else "fetched"
    say_facts({**facts, "dry_run": dry_run}, pull_line(facts, verb), json_output)


def _source(source: str, settings: ShareSettings, from_: str | None) -> tuple[str, Found | None]:
    """Where a bank lies, and what a catalogue says of it, if that was asked.

    A word alone is a name where there is a catalogue; else a folder, but never the one that is to
    be made: `pull x.bank` makes x.bank, and run again means the same.
    """
    from patchbank.pipeline.sharing.catalogue import find
    from patchbank.pipeline.sharing.stores import checked_place

    place = checked_place(source)
    is_folder = "/" in source or (settings.catalogue is None and Path(place).exists())
    if from_ is None and is_folder:
        return place, None
    with phase("catalogue"):
        found = find(source, settings, from_)
    return found.place, found


def _refuse_itself(place: str, out: Path) -> None:
    from patchbank.pipeline.sharing.stores import is_url

    if not is_url(place) and Path(place).resolve() == out.resolve():
        raise PatchbankError(
            f"{out} is the place to pull from and to, expected two; name the catalogue that has it "
            "with --from, or another DEST"
        )


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

    def name_of(self, bank: str) -> str:
        """A name for this part of a bank, that is not the bank's own: x.train.layers3_6.bank."""
        said = [
            "_".join(self.splits),
            "" if self.layers == "all" else f"layers{self.layers}",
            self.clips.stem if self.clips else "",
            "pooled" if self.pooled_only else "",
            self.dtype.value if self.dtype else "",
        ]
        words = [re.sub(r"[^\w-]+", "_", word) for word in said if word]
        return ".".join([bank.removesuffix(".bank"), *words, "bank"]) if words else bank

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
    found: Found | None

    def compare(self, there: RemoteSeal) -> None:
        """With what the catalogue says."""
        if self.found is not None and (note := self.found.check(there)):
            print(f"note: {note}", file=sys.stderr)

    def whole(self, *, dry_run: bool) -> Facts:
        from patchbank.pipeline.sharing.pull import plan_pull, pull_bank
        from patchbank.pipeline.sharing.remote_seal import read_remote_seal
        from patchbank.pipeline.sharing.stores import open_store
        from patchbank.pipeline.sharing.trust import check_trust, read_signatures

        store = open_store(self.place)
        with phase("look"):
            there = read_remote_seal(store)
            self.compare(there)
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
        from patchbank.pipeline.bank.seal_record import seal_bytes
        from patchbank.pipeline.sharing.partial import part_bytes, pull_part
        from patchbank.pipeline.sharing.remote_seal import read_remote_seal
        from patchbank.pipeline.sharing.stores import open_store, safe_url

        with phase("look"):
            if self.found is not None:
                self.compare(read_remote_seal(open_store(self.place)))
            planned = part_bytes(self.place, **chosen.options, out=self.out)
        facts: Facts = {
            "url": safe_url(self.place),
            "bank": str(self.out),
            "clips": planned.schema.n_clips,
            "bytes": planned.travel_bytes,
            "disk_bytes": planned.disk_bytes,
        }
        if dry_run:
            return facts
        before = seal_bytes(self.out)
        with byte_bar("pull") as progress:
            made = pull_part(
                self.place,
                self.out,
                **chosen.options,
                limit_bytes_per_s=self.limit,
                # What is read before anything is chosen comes without a total.
                progress=lambda done, total: progress(done, total or planned.travel_bytes),
                say=lambda line: print(line, file=sys.stderr),
            )
        return facts | {
            "fingerprint": made.fingerprint,
            "root_sha256": made.root_sha256,
            "was_there": before is not None and before == seal_bytes(self.out),
        }


def destination(dest: str | None, name: str) -> Path:
    """The folder that a pull makes."""
    from patchbank.pipeline.sharing.stores import checked_place, is_url, safe_url

    if not name or name in (".", "..") or name.startswith("-"):
        raise PatchbankError(f"the address names no bank ({name!r}); write it with its name")
    if dest is None:
        return Path(name)
    dest = checked_place(dest)
    if is_url(dest):
        raise PatchbankError(
            f"{safe_url(dest)} is no folder of this disk, and a pull goes to one; push to it then"
        )
    return Path(dest) if dest.rstrip("/").endswith(".bank") else Path(dest) / name


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
