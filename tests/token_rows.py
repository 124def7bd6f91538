"""What a reader of rows gives, without a loader around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchbank.pipeline.bank.direct import aligned_memory
from patchbank.probing.row_readers import RowReader


def read_rows(reader: RowReader, rows: Sequence[int]) -> np.ndarray:
    """The bytes of `rows`, one row of the result each, padded as the reader pads them."""
    into = aligned_memory(len(rows) * reader.stride).reshape(len(rows), reader.stride)
    reader.read(np.array(rows, np.int64), into, np.arange(len(rows)))
    return into
