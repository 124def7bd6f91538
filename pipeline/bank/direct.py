"""Past the page cache: the flag, how its refusal looks, and memory that it takes."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os

import numpy as np
from jaxtyping import UInt8

O_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""0 where the platform has no such flag."""
NOT_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a file system without O_DIRECT answers, when a file is opened or when it is used."""
HUGE_PAGE_BYTES = 2 * 2**20


def aligned_memory(n_bytes: int) -> UInt8[np.ndarray, " byte"]:
    """Zeros that begin on a page, as O_DIRECT asks; huge pages where they pay and exist.

    The pages belong to this process alone and go with the last array over them.
    """
    pages = mmap.mmap(-1, max(1, n_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if n_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without them refuses, and small pages do as well.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)[:n_bytes]
