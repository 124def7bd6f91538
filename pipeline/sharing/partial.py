"""Pulls a part of a bank: some layers, some clips, pooled vectors; a bank that is complete itself.

The result has the very bytes that `bank convert` makes of the whole bank. Until it is sealed, what
has come lies in a hidden folder beside it, `.NAME.pull-<first 16 of root_sha256>`, so that a pull
that was killed fetches none of it again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from patchbank.pipeline.bank.card import read_attributes
from patchbank.pipeline.bank.commit import WORK, is_held, owning, read_record, shard_name
from patchbank.pipeline.bank.reader import Bank, open_bank
from patchbank.pipeline.bank.seal_record import SEAL, parse_seal, seal_bytes
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankError,
    BankMismatch,
    NotInStore,
    PatchbankError,
)
from patchbank.pipeline.plan import check_space
from patchbank.pipeline.preparation import telling_of_a_full_disk
from patchbank.pipeline.selection import Selection, make_selection, select
from patchbank.pipeline.sharing.links import inside, refuse_links
from patchbank.pipeline.sharing.part_files import CARD, PartFiles, part_files
from patchbank.pipeline.sharing.pull import fetch_file
from patchbank.pipeline.sharing.remote_bank import RemoteBank, open_remote
from patchbank.pipeline.sharing.remote_seal import seal_content
from patchbank.pipeline.sharing.settings import ShareSettings, load_settings
from patchbank.pipeline.sharing.store import Meter
from patchbank.pipeline.sharing.stores import is_url, open_store
from patchbank.pipeline.sharing.transfer import Traffic, in_parallel
from patchbank.pipeline.sharing.trust import check_opened
from patchbank.pipeline.specs import StoredDType

MOST_KEPT_BYTES = 4 * 2**30
"""Rows that are kept beside a part until it is sealed: those that a kill would cost, and those that
channels are measured on."""
Progress = Callable[[int, int], None]
"""Called with the bytes that have come and that there are to come."""


def part_bytes(
    url: str,
    *,
    layers: str | Sequence[int] = "all",
    splits: Sequence[str] = (),
    clips: Path | None = None,
    dtype: StoredDType | None = None,
    pooled_only: bool = False,
    out: Path | None = None,
) -> PartFiles:
    """What `pull_part` would fetch and make; reads the card, and clips.parquet if clips are chosen.

    Raises what `pull_part` to `out` does before it fetches.
    """
    bank = open_bank(url) if is_url(url) else _open_folder(Path(url))
    if out is not None and isinstance(bank, RemoteBank):
        _check_place(out, bank)
    chosen = select(
        bank, layers=layers, splits=splits, clips=clips, dtype=dtype, pooled_only=pooled_only
    )
    _refuse_all(bank, chosen)
    return part_files(bank, chosen)


def pull_part(
    url: str,
    out: Path,
    *,
    layers: str | Sequence[int] = "all",
    splits: Sequence[str] = (),
    clips: Path | None = None,
    dtype: StoredDType | None = None,
    pooled_only: bool = False,
    limit_bytes_per_s: float | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Bank:
    """The chosen part of the bank at an address or a folder, as the bank `out`.

    Options as in `selection.select`; `dtype` converts here what has come in the type it has there.
    The same call finishes what an earlier one began.
    Raises `PatchbankError` for a layer, split or clip that there is not, before any token travels,
    `BankMismatch` where another bank lies at `out`, and what opening and fetching raise.
    """
    look_up = partial(
        select, layers=layers, splits=splits, clips=clips, dtype=dtype, pooled_only=pooled_only
    )
    if not is_url(url):
        bank = _open_folder(Path(url))
        chosen = look_up(bank)
        _refuse_all(bank, chosen)
        files = part_files(bank, chosen)
        with telling_of_a_full_disk(out):
            return make_selection(
                bank, out, chosen, progress=_shards_as_bytes(files.disk_bytes, progress)
            )
    traffic = Traffic(0, limit_bytes_per_s=limit_bytes_per_s, progress=progress)
    with _staging(url, out, traffic, say or (lambda line: None)) as (staging, source):
        chosen = look_up(source)
        _refuse_all(source, chosen)
        _check_place(out, source)
        with telling_of_a_full_disk(out):
            made = _pull(source, out, chosen, staging, traffic)
    if progress is not None:
        progress(traffic.n_bytes, traffic.n_bytes)
    return made


def _open_folder(path: Path) -> Bank:
    """The bank of a folder, which may be anybody's: no link in it is followed, and it is signed
    where the settings want that of banks that come from elsewhere."""
    bank = open_bank(path)
    for name in bank.seal.files:
        inside(path, name)
    check_opened(path, seal_bytes(path) or b"")
    return bank


def _shards_as_bytes(n_bytes: int, progress: Progress | None) -> Progress:
    """Told of shards, tells of bytes."""
    tell = progress or (lambda done, total: None)
    return lambda done, total: tell(n_bytes * done // total, n_bytes)


def _refuse_all(bank: Bank, chosen: Selection) -> None:
    if chosen.is_all_of(bank):
        raise PatchbankError(
            f"these options leave nothing of {bank.where} out; `patchbank bank pull` without them "
            "takes it whole"
        )


@contextmanager
def _staging(
    url: str, out: Path, meter: Meter, say: Callable[[str], None]
) -> Iterator[tuple[Path, RemoteBank]]:
    """A folder that this process alone works in, and the bank with that as its cache.

    It is gone when the part is sealed, or where nothing was begun.
    """
    settings = load_settings()
    folder = _folder(url, out, settings)
    with ExitStack() as stack:
        _enter(stack, folder, out, say)
        limit = min(settings.cache_limit_bytes, MOST_KEPT_BYTES)
        own = replace(settings, cache=folder, cache_limit_bytes=limit)
        try:
            source = open_remote(url, settings=own)
            source.remote.meter = meter
            yield folder, source
        finally:
            if (out / SEAL).is_file() or not (out / CARD).is_file():
                shutil.rmtree(folder, ignore_errors=True)


def _folder(url: str, out: Path, settings: ShareSettings) -> Path:
    content = seal_content(store := open_store(url))
    # Opening it tells why there is none.
    seal = (
        open_remote(url, settings=settings).seal
        if content is None
        else parse_seal(content, where=store.url)
    )
    return out.absolute().with_name(f".{out.absolute().name}.pull-{seal.root_sha256[:16]}")


def _enter(stack: ExitStack, folder: Path, out: Path, say: Callable[[str], None]) -> None:
    """Takes a folder's lock; another pull that had it may have removed the folder since."""
    is_told = False
    while True:
        if folder.is_symlink():
            raise BankError(f"{folder} is a link; remove it, or choose another place")
        refuse_links(folder)
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        if is_held(folder / WORK / "seal.lock") and not is_told:
            say(f"another process pulls into {out}; waiting for it")
            is_told = True
        try:
            stack.enter_context(owning(folder))
        except FileNotFoundError:
            continue
        return


def _check_place(out: Path, source: RemoteBank) -> None:
    """Before gigabytes have come: raises where `out` is something else than a part of `source`."""
    if not out.exists():
        return
    if not (out / CARD).is_file():
        raise BankError(f"{out} exists and is no bank; choose another place or remove it")
    origins = read_attributes(out)["card"].get("derived_from", [])
    listed = origins if isinstance(origins, list) else []
    found = [str(origin.get("root_sha256"))[:16] for origin in listed if isinstance(origin, dict)]
    if found != [source.root_sha256[:16]]:
        raise BankMismatch(
            f"{out} holds another bank than a part of {source.where} as it is now; choose another "
            "place",
            {"derived_from": (found, [source.root_sha256[:16]])},
        )


def _pull(
    source: RemoteBank, out: Path, chosen: Selection, staging: Path, traffic: Traffic
) -> Bank:
    files = part_files(source, chosen)
    traffic.n_bytes = files.travel_bytes
    if not (out / SEAL).is_file():
        if not (out / CARD).is_file():
            check_space(out, files.disk_bytes)
        source.files([file.path for file in files.small])
    bank: Bank = source
    if files.whole:
        bank = _WholeShards(source, out, staging / "whole", files.whole, traffic)
    return make_selection(bank, out, chosen, progress=lambda done, total: None)


class _WholeShards(RemoteBank):
    """A bank whose shard files are fetched whole, all together when the first one is asked for."""

    def __init__(
        self,
        source: RemoteBank,
        out: Path,
        folder: Path,
        records: Sequence[FileRecord],
        meter: Meter,
    ) -> None:
        self.__dict__.update(source.__dict__)
        self._out, self._folder, self._meter = out, folder, meter
        self._left = {record.path: record for record in records}
        self._shards = frozenset(self._left)

    def files(self, names: Sequence[str]) -> list[Path]:
        if self._left and self._shards.intersection(names):
            self._fetch()
        others = [name for name in names if name not in self._shards]
        found = dict(zip(others, super().files(others), strict=True))
        return [found.get(name, self._folder / name) for name in names]

    def _fetch(self) -> None:
        done = {
            array.shard_path(shard)
            for shard in range(self.schema.n_shards)
            if read_record(self._out, shard_name(shard)) is not None
            for array in self.schema.arrays()
        }
        store, drafts = self.remote.store, self._folder / "drafts"
        shutil.rmtree(drafts, ignore_errors=True)
        drafts.mkdir(parents=True)
        jobs = [
            partial(fetch_file, store, record, self._folder, drafts, self._meter)
            for name, record in self._left.items()
            if name not in done and not (self._folder / name).is_file()
        ]
        try:
            in_parallel(jobs)
        except (NotInStore, BankCorrupt) as error:
            problem = self.remote.problem(str(error))
            raise error if isinstance(problem, BankCorrupt) else problem from error
        self._left = {}
