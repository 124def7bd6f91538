"""How far an extraction is: shards that are committed, and clips of those that are open."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from patchbank.pipeline.job import ShardReport


@dataclass(frozen=True)
class Progress:
    """How far an extraction is."""

    n_clips: int
    """Clips that this run has to encode."""
    n_done: int = 0
    n_failed: int = 0
    n_open: int = 0
    """Clips encoded in shards that are not committed yet, without those of lost workers."""
    n_workers: int = 1
    doing: str = ""
    """What is done now, where that is not encoding."""
    report: ShardReport | None = field(default=None, compare=False)
    """Of the shard that has just ended."""

    @property
    def n_encoded(self) -> int:
        """Clips behind the encoder, whatever became of them."""
        return self.n_done + self.n_failed + self.n_open

    def after(self, report: ShardReport) -> Progress:
        """With one more shard."""
        n_done, n_failed = self.n_done + report.n_done, self.n_failed + report.n_failed
        return replace(self, n_done=n_done, n_failed=n_failed, report=report)


class OpenShards:
    """Clips that workers have encoded in the shards that they have not committed yet."""

    def __init__(self) -> None:
        # `note` comes from another thread: it changes values, never the keys.
        self._open: dict[int, tuple[str, int]] = {}

    def begin(self, shard: int) -> None:
        self._open[shard] = ("", 0)

    def end(self, shard: int) -> None:
        del self._open[shard]

    def note(self, event: tuple[float, Mapping[str, Any]]) -> None:
        """What a worker says of a shard, as Dask hands it on with the worker's address."""
        said = event[1]
        if said["shard"] in self._open:
            self._open[said["shard"]] = (said["worker"], said["n_clips"])

    def n_clips(self, workers: Collection[str]) -> int:
        """Clips encoded by workers of these addresses: what a lost one began is begun anew."""
        return sum(n_clips for worker, n_clips in self._open.values() if worker in workers)
