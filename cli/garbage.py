"""`patchbank bank rm`, `pin` and `gc`: what goes, what stays, and what was left behind."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.cli.bars import count_bar, phase
from patchbank.pipeline.errors import PatchbankError

if TYPE_CHECKING:
    from patchbank.pipeline.sharing.garbage import Garbage, Limits
    from patchbank.pipeline.sharing.settings import ShareSettings

Facts = dict[str, Any]
Place = Annotated[str, typer.Argument(metavar="BANK|URL", help="A bank's folder, or its address.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def remove(bank: Place, dry_run: DryRun = False, yes: Yes = False) -> None:
    """Remove a bank, sealed or not; nothing that is no bank, no link, none that is being made."""
    from patchbank.pipeline.sharing.folder_store import FolderStore
    from patchbank.pipeline.sharing.removal import (
        local_doomed,
        remove_local,
        remove_stored,
        stored_doomed,
    )
    from patchbank.pipeline.sharing.settings import load_settings
    from patchbank.pipeline.sharing.stores import open_store, split_place
    from patchbank.pipeline.specs import human_bytes

    store, cache = open_store(bank), load_settings().cache
    with phase("read"):
        if isinstance(store, FolderStore):
            doomed = local_doomed(store.folder, cache)
        else:
            doomed = stored_doomed(store, cache)
    facts = f"({doomed.clips} clips)"
    if dry_run:
        print(f"would remove {doomed.place} {facts} and free {human_bytes(doomed.n_bytes)}")
        return
    if not yes:
        ask(f"Free {human_bytes(doomed.n_bytes)}: remove {doomed.place} {facts}?")
    if isinstance(store, FolderStore):
        with phase("remove"):
            remove_local(store.folder)
    else:
        folder, name = split_place(bank)
        with count_bar("remove", "files", vanishes=True) as step:
            remove_stored(store, of=(open_store(folder), name), progress=step)
    print(f"removed {doomed.place}")


def ask(question: str) -> None:
    """Goes on only after a yes; says how to go on without a question where nobody answers."""
    try:
        typer.confirm(question, abort=True, err=True)
    except typer.Abort:
        if not sys.stdin.isatty():
            print("nothing removed; --yes removes without a question", file=sys.stderr)
        raise


def pin(
    bank: Place,
    unpin: Annotated[bool, typer.Option("--remove", help="Take the pin away.")] = False,
) -> None:
    """Keep a bank: neither `rm` nor `gc` removes it. Of a URL, the cache keeps the rows it has."""
    from patchbank.pipeline.sharing.folder_store import FolderStore
    from patchbank.pipeline.sharing.pins import set_pin
    from patchbank.pipeline.sharing.settings import load_settings
    from patchbank.pipeline.sharing.stores import open_store

    store = open_store(bank)
    set_pin(store, load_settings().cache, pinned=not unpin)
    where = "" if isinstance(store, FolderStore) else " in the cache"
    print(f"{'unpinned' if unpin else 'pinned'} {store.url}{where}")


def collect(
    place: Annotated[
        str, typer.Argument(metavar="[FOLDER|URL]", help="Where banks lie.", show_default=False)
    ] = ".",
    older_than: Annotated[
        str,
        typer.Option(metavar="AGE", help="Keep unfinished banks that were touched since: 12h, 7d."),
    ] = "7d",
    extractions: Annotated[
        bool,
        typer.Option("--extractions", help="Remove interrupted extractions, too; else named only."),
    ] = False,
    cache: Annotated[
        bool,
        typer.Option("--cache", help="Empty the cache of rows; else only down to its limit."),
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Remove what was left behind: pulls and pushes that never finished, removals cut short.

    Nothing goes that a process works on, that is pinned or sealed, or that is no bank.
    """
    import json

    from patchbank.pipeline.sharing.garbage import Limits
    from patchbank.pipeline.sharing.settings import load_settings

    limits = Limits(parse_age(older_than), extractions)
    found = _found(place, limits, load_settings(), cache=cache)
    goes = [each for each in found if each.remove is not None]
    if not json_output:
        print_garbage(found, dry_run=dry_run)
    removed: list[Garbage] = []
    if goes and not dry_run:
        if not yes:
            ask(f"Remove {len(goes)} of these?" if len(goes) < len(found) else "Remove all this?")
        with count_bar("remove", "left", vanishes=True) as step:
            for number, each in enumerate(goes):
                assert each.remove is not None
                removed += [each] * each.remove()
                step(number + 1, len(goes))
    if json_output:
        print(json.dumps([facts_of(each, is_removed=each in removed) for each in found]))
    elif goes and not dry_run:
        _say_removed(goes, removed)


def _found(place: str, limits: Limits, settings: ShareSettings, *, cache: bool) -> list[Garbage]:
    from patchbank.pipeline.sharing.folder_store import FolderStore
    from patchbank.pipeline.sharing.garbage import find_garbage
    from patchbank.pipeline.sharing.store_garbage import find_cached_garbage, find_stored_garbage
    from patchbank.pipeline.sharing.stores import open_store

    banks = open_store(place)
    if not isinstance(banks, FolderStore):
        with count_bar("look", "banks", vanishes=True) as step:
            return find_stored_garbage(banks, limits, settings.cache, progress=step)
    if not banks.folder.is_dir():
        raise PatchbankError(f"no folder {place}; name the folder that holds the banks")
    with phase("look"):
        found = find_garbage(banks.folder, limits)
        return [*found, *find_cached_garbage(settings, limits, everything=cache)]


def _say_removed(goes: Sequence[Garbage], removed: Sequence[Garbage]) -> None:
    from patchbank.pipeline.specs import human_bytes

    print(f"freed {human_bytes(sum(each.n_bytes for each in removed))}")
    if n_kept := len(goes) - len(removed):
        print(f"{n_kept} came to life meanwhile and stay", file=sys.stderr)


def facts_of(each: Garbage, *, is_removed: bool) -> Facts:
    """What `--json` says of something that was left behind."""
    return {
        "place": each.place,
        "reason": each.reason,
        "bytes": each.n_bytes,
        "named_only": each.remove is None,
        "removed": is_removed,
    }


def print_garbage(found: Sequence[Garbage], *, dry_run: bool) -> None:
    """What was found, a line or two each, and how much would be freed."""
    from patchbank.cli.listing import print_beside
    from patchbank.pipeline.bank.damage import shown
    from patchbank.pipeline.specs import human_bytes

    for each in found:
        size = "-" if each.remove is None else human_bytes(each.n_bytes)
        print_beside(f"{size:>9}  ", f"{shown(each.place)}: {each.reason}")
    n_bytes = sum(each.n_bytes for each in found if each.remove is not None)
    if not any(each.remove for each in found):
        print("nothing to remove")
    elif dry_run:
        print(f"{human_bytes(n_bytes):>9}  would be freed")
    else:
        print(f"{human_bytes(n_bytes):>9}  in all")


def parse_age(text: str) -> float:
    """12h, 7d or 0s as seconds."""
    match = re.fullmatch(r"(\d{1,6})\s*([smhdw])", text.strip().lower())
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is no age; write 30m, 12h or 7d", param_hint="--older-than"
        )
    return float(match[1]) * SECONDS[match[2]]
