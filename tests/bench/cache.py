"""Cold and warm files, and memory that has been touched."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from patchbank.pipeline.bank.direct import aligned_memory
from patchbank.probing.tiers import free_memory_bytes

BLOCK_BYTES = 2**23
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
LIBC = ctypes.CDLL(None, use_errno=True)


def files_below(folder: Path) -> list[Path]:
    """Every file of a store, or the file itself."""
    return [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def make_cold(folder: Path) -> None:
    """Drops a store from the page cache; ends the run where some of it stays.

    Pages that a process has mapped cannot be dropped: a reader must have been closed before.
    """
    gc.collect()
    for path in files_below(folder):
        with opened(path) as descriptor:
            # Dirty pages are not dropped.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    with suppress(OSError):  # only root may, and not in a container
        DROP_CACHES.write_text("1")
    share = resident_share(files_below(folder))
    if share > 0.05:
        raise SystemExit(
            f"{share:.0%} of {folder} stays in the page cache, so that nothing there is cold: "
            "something has it mapped, or it lies in memory; choose another --folder"
        )


def make_warm(folder: Path) -> None:
    """Reads all of a store once."""
    block = bytearray(BLOCK_BYTES)
    for path in files_below(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def resident_share(paths: Iterable[Path]) -> float:
    """The share of the files' pages that lie in the page cache; looking changes nothing."""
    flags = [_resident_pages(path) for path in paths if path.stat().st_size]
    return float(np.concatenate(flags).mean()) if flags else 0.0


def _resident_pages(path: Path) -> np.ndarray:
    mapped = np.memmap(path, np.uint8, "r")
    flags = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
    address, out = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_void_p(flags.ctypes.data)
    if LIBC.mincore(address, ctypes.c_size_t(len(mapped)), out):
        raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return flags & 1


def touch_memory(share: float = 0.6) -> int:
    """Writes a share of the free memory once and gives it back; its bytes.

    In a virtual machine memory that was never used comes from the host page by page, ten times
    slower than a disk: whichever reader came first would pay for it.
    """
    n_bytes = int(share * free_memory_bytes())
    aligned_memory(n_bytes)[:: mmap.PAGESIZE] = 1
    return n_bytes


def resident_bytes() -> int:
    """Memory of this process, the pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
