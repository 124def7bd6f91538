"""What it costs that a bank grows: seconds to open it, to find its rows and to read them.

    python tests/bench/growth.py [--rows 1000 10000 100000] [--large 2000000] [--json]

Banks of small rows are read whole. Where every row costs the same, the ratio of the time a row
between the largest bank and the smallest is 1; below 1 is what happens once, however many rows
there are; above 1 would be a cost that grows faster than the bank. The large bank has rows of
768 KiB, which are sparse: at 2,000,000 rows it is 1.5 TiB to everybody who reads it, and 0.3 GiB to
the disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from sparse_bank import make_sparse_bank
from synthetic_bank import make_bank

from patchbank.pipeline.bank import open_bank
from patchbank.pipeline.bank.schema import DONE
from patchbank.pipeline.specs import Json, human_bytes
from patchbank.probing import BatchLoader
from patchbank.probing.plan import batches
from patchbank.probing.tiers import Tier

BATCH_ROWS = 64
LARGE_BATCHES = 32
"""Read from the large bank; all of them would take as long as 1.5 TiB take."""


class Stopwatch:
    """The least seconds that each step took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.seconds[step] = min(seconds, self.seconds.get(step, seconds))


def read_bank(path: Path, n_batches: int | None, tier: Tier) -> Json:
    """What a training does with a bank, up to so many batches, three times over."""
    watch, before_bytes = Stopwatch(), peak_bytes()
    for _ in range(3):
        with watch("open_bank"):
            bank = open_bank(path)
        with watch("places"):
            bank.places(bank.layers[-1])
        with watch("status"):
            rows = np.flatnonzero(bank.status == DONE)
        with watch("plan"):
            batches(rows, batch_size=BATCH_ROWS, seed=0, epoch=0)
        with watch("BatchLoader"):
            loader = BatchLoader(bank, batch_size=BATCH_ROWS, tier=tier)
        with watch("batches"):
            n_read = sum(len(batch.rows) for batch in islice(loader, n_batches))
    return {
        "rows": bank.n_rows,
        "rows_read": n_read,
        "bank_bytes": bank.seal.bank_bytes,
        "files": len(bank.seal.files),
        "tier": str(loader.source.tier),
        "peak_bytes": peak_bytes(),
        "before_bytes": before_bytes,
        "seconds": watch.seconds,
    }


def peak_bytes() -> int:
    """The most memory that this process has held; `ru_maxrss` would begin with its parent's."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def in_a_fresh_process(path: Path, n_batches: int | None, tier: Tier) -> Json:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(read_bank, path, n_batches, tier).result()


def read_small(n_rows: int, folder: Path) -> Json:
    make_bank(folder / "small.bank", n_clips=n_rows, n_patches=8, dim=64)
    found = in_a_fresh_process(folder / "small.bank", None, "map")
    shutil.rmtree(folder / "small.bank")
    return found


def read_large(n_rows: int, folder: Path) -> Json:
    make_sparse_bank(folder / "large.bank", n_clips=n_rows)
    return in_a_fresh_process(folder / "large.bank", LARGE_BATCHES, "direct")


def print_small(found: list[Json]) -> None:
    print(f"{'microseconds a row':20}" + "".join(f"{bank['rows']:>12,}" for bank in found), "ratio")
    for what in found[0]["seconds"]:
        each = [1e6 * bank["seconds"][what] / bank["rows"] for bank in found]
        print(
            f"{what:20}" + "".join(f"{value:12.2f}" for value in each), f"{each[-1] / each[0]:5.2f}"
        )


def print_large(found: Json) -> None:
    print(f"\n{found['rows']:,} rows, {human_bytes(found['bank_bytes'])}, {found['files']:,} files")
    for what, seconds in found["seconds"].items():
        print(f"{what:20}{seconds:12.3f} s")
    print(f"{found['rows_read']:,} rows were read, {found['tier']}")
    before, peak = (human_bytes(found[name]) for name in ("before_bytes", "peak_bytes"))
    print(f"{peak} of memory at most, {before} before the bank was opened")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--large", type=int, default=2_000_000, help="rows of the sparse bank")
    parser.add_argument("--folder", type=Path, help="where the banks lie meanwhile")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        small = [read_small(n_rows, Path(folder)) for n_rows in sorted(chosen.rows)]
        large = read_large(chosen.large, Path(folder))
    if chosen.json:
        print(json.dumps({"small": small, "large": large}, indent=1))
    else:
        print_small(small)
        print_large(large)


if __name__ == "__main__":
    main()
