"""What every store of a benchmark holds: token-like clips that can be told from a few values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

POOL_VALUES = 2**24
N_MARKS = 16


@dataclass(frozen=True)
class SyntheticClips:
    """`n_clips` clips of normal values in float16, the same for the same seed.

    Each clip is a stretch of one pool of random values, which costs a copy instead of a draw. No
    two begin at the same place, so a disk finds no equal blocks in them.
    """

    n_clips: int
    n_patches: int = 512
    dim: int = 768
    seed: int = 0

    @property
    def n_values(self) -> int:
        return self.n_patches * self.dim

    @property
    def row_bytes(self) -> int:
        return 2 * self.n_values

    @cached_property
    def _pool(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 0])
        return rng.standard_normal(POOL_VALUES, np.float32).astype(np.float16)

    @cached_property
    def _starts(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 1])
        return rng.choice(POOL_VALUES - self.n_values, self.n_clips, replace=False)

    def rows(self, rows: range) -> np.ndarray:
        """Clips as one array (clip, patch, dim)."""
        out = np.empty((len(rows), self.n_values), np.float16)
        for slot, start in enumerate(self._starts[rows.start : rows.stop].tolist()):
            out[slot] = self._pool[start : start + self.n_values]
        return out.reshape(-1, self.n_patches, self.dim)

    def blocks(self, size: int) -> list[range]:
        """All rows, `size` at a time."""
        starts = range(0, self.n_clips, size)
        return [range(start, min(start + size, self.n_clips)) for start in starts]

    @cached_property
    def mark_places(self) -> np.ndarray:
        """Places in a flat clip whose values tell it: its first, its last and some between."""
        return np.linspace(0, self.n_values - 1, N_MARKS).astype(np.int64)

    @cached_property
    def marks(self) -> np.ndarray:
        """The values at `mark_places` of every clip (clip, mark)."""
        return self._pool[self._starts[:, None] + self.mark_places]

    def values_at(self, places: np.ndarray) -> np.ndarray:
        """Values by their place in all clips, laid end to end."""
        clip, place = np.divmod(places, self.n_values)
        return self._pool[self._starts[clip] + place]
