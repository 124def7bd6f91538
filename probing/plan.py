"""Which rows make which batch: pure functions, apart from how the rows are read."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

Rows = Int[np.ndarray, " row"]
"""Row numbers of a bank; several views of a clip are several rows."""
BatchRows = Int[np.ndarray, " _"]
"""The rows of one batch; batches of one plan may differ in length."""
Plan = list[BatchRows]


def batches(rows: Rows, *, batch_size: int, seed: int, epoch: int) -> Plan:
    """Each of `rows` once, in an order that (rows, seed, epoch) alone decide.

    The last batch is short where `batch_size` does not divide the rows. A row of a bank is so
    large that reading in this order costs nothing over reading in sequence.
    """
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return sequential(order, batch_size=batch_size)


def sequential(rows: Rows, *, batch_size: int) -> Plan:
    """`rows` as they come, cut into batches, the last of which may be short."""
    if batch_size < 1:
        raise ValueError(f"found batch_size={batch_size}, expected at least 1")
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
