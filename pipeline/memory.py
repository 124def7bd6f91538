"""How much memory a worker's pipeline takes, beside the encoder and the libraries.

However many clips there are: waveforms lie in a ring of slots, tokens in the batches that are on
their way, rows in the rings of the files that are written. Who has no room waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from patchbank.pipeline.bank.schema import BankSchema
from patchbank.pipeline.bank.writer import ring_bytes
from patchbank.pipeline.decoding import SHARED_BATCHES
from patchbank.pipeline.environment import is_cpu
from patchbank.pipeline.lanes import batches_ahead, n_slots
from patchbank.pipeline.specs import Recipe


@dataclass(frozen=True)
class PipelineMemory:
    """The largest that each part gets, in bytes."""

    waveforms: int
    tokens: int
    rows: int
    views: int
    """Decoded clips that views share."""

    @property
    def n_bytes(self) -> int:
        return self.waveforms + self.tokens + self.rows + self.views


def pipeline_memory(
    recipe: Recipe,
    schema: BankSchema,
    *,
    device: str,
    n_threads: int,
    batch_size: int,
    n_shards: int,
) -> PipelineMemory:
    """Of a worker that works on `n_shards` shards at once, on so many cores where it is a CPU.

    On a GPU's machine the waveforms and the tokens are pinned.
    """
    waveform_bytes = 4 * batch_size * recipe.window.n_samples(recipe.encoder.sample_rate_hz)
    arrays = schema.arrays()
    batches = [batch_size * array.row_bytes for array in arrays]
    # PyTorch hands out pinned memory in powers of two.
    token_bytes = sum(batches if is_cpu(device) else (1 << (n - 1).bit_length() for n in batches))
    rows = sum(ring_bytes(array.layout(schema.rows_per_shard)) for array in arrays)
    shared = 0 if recipe.augment is None else SHARED_BATCHES * n_shards
    return PipelineMemory(
        waveforms=n_slots(device, n_threads) * waveform_bytes,
        tokens=n_shards * (batches_ahead(device, n_threads) + 1) * token_bytes,
        rows=n_shards * rows,
        views=shared * waveform_bytes,
    )
