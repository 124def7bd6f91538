"""What some stores can tell of what was left behind in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class TellsAge(Protocol):
    """A store that knows when its files were written."""

    def newest_s(self) -> float | None:
        """When the newest file, at any depth, was written, as `time.time` counts; None where
        there is none."""
        ...


@dataclass(frozen=True)
class UnfinishedUpload:
    """A file that was begun to be sent in parts, which are kept, and paid for, until it is done."""

    name: str
    upload_id: str
    began_s: float


@runtime_checkable
class KeepsUploads(Protocol):
    """A store that keeps the parts of files that were never completed."""

    def unfinished_uploads(self) -> list[UnfinishedUpload]: ...
    def abandon(self, upload: UnfinishedUpload) -> None: ...
