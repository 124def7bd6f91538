"""How fast a bank is read and written, against what the disk can do and against other formats.

    python tests/bench/bank.py [--clips 2048] [--rounds 5] [--json FILE] [--only WORD...]

Every measure runs once a round, those that are compared closely one after another, in an order that
changes; a ratio is taken within a round, and the table holds medians over rounds. All readers get
the same random order, each clip once, and hand out contiguous batches of 64 clips, which are
checked. Cold: the store's files were dropped from the page cache, and the kernel says that they are
gone. Needs about a dozen times the clips' bytes on the disk, and `pip install -e .[bench]`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from cache import touch_memory
from clips import SyntheticClips
from limits import FlatFile
from machine import describe, machine_facts
from own import float16_reader, int8_reader
from peers import BANK, PEERS, Peer
from reading import BATCH_SIZE, Opened, Reader, Sample, draw_order, read_cold, read_warm
from report import Measure, Results, print_table, table_rows
from synthetic_bank import make_bank
from writing import (
    RAW_BLOCKS,
    RAW_THREADS,
    hash_twice,
    make_job,
    measured,
    write_own,
    write_raw,
    write_zarr,
)

from patchbank.pipeline.bank.layout import rows_per_shard

LIMIT_THREADS = (1, 2, 4, 8)
WARM_THREADS = (1, 2, 4)
COLD_TIERS = ("auto", "direct", "ram", "read", "map")
WARM_TIERS = ("auto", "read", "map", "ram")
BESIDE_LIMIT = "zarrs"
"""The one peer that comes near the limit: it is measured next to it, the others after."""


@dataclass(frozen=True)
class Store:
    """Files that have to be there before a measure runs."""

    path: Path
    write: Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """What is measured, on which stores."""

    folder: Path
    clips: SyntheticClips
    options: argparse.Namespace

    def measures(self) -> Iterator[tuple[Measure, Store | None]]:
        """Everything there is, with the store that it reads."""
        yield from self._limits()
        yield from self._own()
        for peer in (kind(self.folder, self.clips) for kind in PEERS):
            if not peer.missing():
                yield from self._peer(peer)
        yield from self._writers()

    @property
    def _bank(self) -> Store:
        return self._bank_store(BANK, "float16")

    def _bank_store(self, name: str, dtype: str) -> Store:
        path, clips = self.folder / name, self.clips
        write = partial(
            make_bank,
            path,
            n_clips=clips.n_clips,
            n_patches=clips.n_patches,
            dim=clips.dim,
            dtype=dtype,
            seed=clips.seed,
        )
        return Store(path, write)

    def _limits(self) -> Iterator[tuple[Measure, Store]]:
        flat = FlatFile(self.folder / "flat.bin", self.clips)
        store, row_bytes = Store(flat.path, flat.write), self.clips.row_bytes
        for family, n_bytes in (("limit", row_bytes), ("int8 limit", row_bytes // 2)):
            for n in LIMIT_THREADS:
                name = f"O_DIRECT {n_bytes // 1024} KiB x{n}"
                run = partial(flat.read_cold, row_bytes=n_bytes, n_threads=n)
                yield Measure("cold", family, name, n_bytes, run), store
        for n in WARM_THREADS:
            run = partial(flat.read_warm, row_bytes=row_bytes, n_threads=n)
            yield Measure("warm", "limit", f"preadv x{n}", row_bytes, run), store

    def _own(self) -> Iterator[tuple[Measure, Store]]:
        bank, tiers = self._bank, self.options.tiers
        for tier in (tier for tier in COLD_TIERS if tier in tiers):
            # A bank that is larger than memory is read from the disk in every epoch.
            reader = float16_reader(bank.path, self.clips, tier, reads_once=True)
            yield self._reading("cold", "patchbank", reader), bank
        for tier in (tier for tier in WARM_TIERS if tier in tiers):
            reader = float16_reader(bank.path, self.clips, tier, reads_once=False)
            yield self._reading("warm", "patchbank", reader), bank
        bank = self._bank_store("int8.bank", "int8")
        for tier in (tier for tier in ("auto", "direct") if tier in tiers):
            for is_raw in (True, False):
                reader = int8_reader(bank.path, self.clips, tier, is_raw=is_raw)
                yield self._reading("cold", "int8", reader), bank

    def _peer(self, peer: Peer) -> Iterator[tuple[Measure, Store]]:
        reader = Reader(
            peer.name,
            peer.path,
            lambda order: Opened(peer.open(order)),
            lambda: self.clips.marks,
            keeps_order=peer.keeps_order,
        )
        store = self._bank if peer.path == self._bank.path else Store(peer.path, peer.write)
        for section in ("peers", "warm"):
            yield self._reading(section, peer.package, reader, peer.setting), store

    def _reading(self, section: str, family: str, reader: Reader, setting: str = "") -> Measure:
        read = read_warm if section == "warm" else read_cold
        run = partial(read, reader, clips=self.clips, most_s=self.options.seconds)
        row_bytes = self.clips.row_bytes // (2 if family == "int8" else 1)
        return Measure(section, family, reader.name, row_bytes, run, setting)

    def _writers(self) -> Iterator[tuple[Measure, None]]:
        n_rows = rows_per_shard(
            n_rows=self.clips.n_clips, largest_row_bytes=self.clips.row_bytes, files_per_shard=2
        )
        job = make_job(
            self.folder / "write",
            self.clips,
            n_clips=self.options.write_clips,
            rows_per_shard=n_rows,
        )
        runs: list[tuple[str, str, Callable[[], Sample]]] = [
            ("patchbank", "patchbank", partial(measured, write_own, job)),
            ("zarr", "zarr-python, whole shards", partial(measured, write_zarr, job)),
            ("sha256", "SHA-256 twice, all cores", partial(hash_twice, job)),
        ]
        for n in RAW_THREADS:
            for size in RAW_BLOCKS:
                write = partial(write_raw, n_threads=n, block_bytes=size)
                name = f"O_DIRECT {size // 2**20} MiB x{n}"
                runs.append(("limit", name, partial(measured, write, job)))
        for family, name, run in runs:
            yield (
                Measure("write", family, name, self.clips.row_bytes, lambda _, run=run: run()),
                None,
            )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    clips = SyntheticClips(options.clips, *options.shape)
    with work_folder(options) as folder:
        facts = machine_facts(folder)
        say(describe(facts))
        if options.pretouch:
            say(f"touched {touch_memory() / 2**30:.1f} GiB of memory")
        chosen = [
            (measure, store)
            for measure, store in Bench(folder, clips, options).measures()
            if is_chosen(measure, options)
        ]
        for store in {store.path: store for _, store in chosen if store}.values():
            build(store, clips)
        results = run_rounds([measure for measure, _ in chosen], clips, options)
    rows = table_rows(results)
    print_table(rows, [describe(facts), *notes(results), *missing_peers()])
    if options.json:
        content = {
            "machine": facts,
            "options": {key: str(value) for key, value in vars(options).items()},
            "table": [asdict(row) | {"is_met": row.is_met} for row in rows],
            "measures": results.as_json(),
            "skipped": missing_peers(),
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--clips", type=int, default=2048, help="clips in each store")
    add("--cold-clips", type=int, help="clips that a reader reads at most; all unless given")
    add("--write-clips", type=int, default=1024, help="clips that a writer writes")
    add("--seconds", type=float, default=6.0, help="after which a slow reader stops")
    add("--rounds", type=int, default=5)
    add("--tiers", nargs="+", default=["auto", "direct", "read", "map", "ram"], metavar="TIER")
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="sections, packages, or parts of names",
    )
    add("--skip", nargs="+", default=[], metavar="WORD")
    add("--folder", type=Path, help="where the stores are made; a temporary folder unless given")
    add("--keep", action="store_true", help="leave the stores, for another run")
    add("--no-pretouch", dest="pretouch", action="store_false", help="use memory as it is")
    add("--json", type=Path, metavar="FILE")
    add("--shape", type=int, nargs=2, default=[512, 768], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.cold_clips = options.cold_clips or options.clips
    options.write_clips = min(options.write_clips, options.clips)
    if options.clips % BATCH_SIZE or options.cold_clips % BATCH_SIZE:
        parser.error(f"clips come in batches of {BATCH_SIZE}")
    if not 0 < options.cold_clips <= options.clips:
        parser.error("--cold-clips are some of --clips")
    if np.prod(options.shape) % 4096:
        parser.error("rows of int8 have to be whole pages of 4,096 bytes")
    return options


@contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Where the stores lie; they are removed in the end, and the folder if nobody gave it."""
    folder = options.folder or Path(tempfile.mkdtemp(prefix="patchbank-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    try:
        needed = 14 * options.clips * 2 * int(np.prod(options.shape))
        if not before and shutil.disk_usage(folder).free < needed:
            raise SystemExit(f"{folder} needs {needed / 2**30:.0f} GiB; choose another --folder")
        yield folder
    finally:
        if options.keep:
            say(f"the stores are in {folder}")
        else:
            for path in set(folder.iterdir()) - (before if options.folder else set()):
                remove(path)
            if not options.folder:
                folder.rmdir()


def build(store: Store, clips: SyntheticClips) -> None:
    """Makes a store, unless an earlier run left the same one."""
    mark = store.path.with_name(f"{store.path.name}.done")
    if mark.is_file() and mark.read_text() == repr(clips):
        return
    remove(store.path)
    say(f"writing {store.path.name}")
    store.write()
    mark.write_text(repr(clips))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_chosen(measure: Measure, options: argparse.Namespace) -> bool:
    def matches(word: str) -> bool:
        return word in (measure.section, measure.family) or word in measure.key

    return (not options.only or any(map(matches, options.only))) and not any(
        map(matches, options.skip)
    )


def run_rounds(
    measures: Sequence[Measure], clips: SyntheticClips, options: argparse.Namespace
) -> Results:
    results = Results(measures)
    for number in range(options.rounds):
        order = draw_order(clips.n_clips, options.cold_clips, number)
        for measure in in_blocks(measures, number):
            sample = measure.run(order)
            results.samples[measure.key].append(sample)
            say(f"round {number + 1}/{options.rounds}  {measure.key}  {sample.clips_per_s:,.0f}")
    return results


def in_blocks(measures: Sequence[Measure], seed: int) -> list[Measure]:
    """Block by block, in another order each round, those that are compared closely in one block."""
    rng = np.random.default_rng([seed, 3])
    blocks: dict[str, list[Measure]] = {}
    for measure in measures:
        is_close = measure.section == "peers" and measure.family == BESIDE_LIMIT
        blocks.setdefault("cold" if is_close else measure.section, []).append(measure)
    order: list[Measure] = []
    for name in rng.permutation(sorted(blocks)):
        block = blocks[name]
        order += [block[i] for i in rng.permutation(len(block))]
    return order


def notes(results: Results) -> list[str]:
    """What the loader took to begin, and what reading and writing keep in memory."""
    begun = [
        f"{key.replace('patchbank ', '')} {np.median(seconds):.2f} s"
        for key in results.keys("cold", "patchbank", "int8") + results.keys("warm", "patchbank")
        if (seconds := values(results, key, "construct_s"))
    ]
    lines = [f"construction: {', '.join(begun)}"] if begun else []
    for key in ("cold: patchbank direct", "write: patchbank"):
        for name in ("ring_bytes", "rss_growth_bytes"):
            if found := values(results, key, name):
                lines.append(f"{key}: {name} {max(found) / 2**20:,.1f} MiB")
    return lines


def values(results: Results, key: str, name: str) -> list[float]:
    """A fact of each sample that has it."""
    return [s.facts[name] for s in results.samples.get(key, []) if name in s.facts]


def missing_peers() -> list[str]:
    missing = sorted({package for peer in PEERS if (package := peer.missing())})
    return [f"skipped: {package} is not installed" for package in missing]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
