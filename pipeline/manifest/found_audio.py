"""Recordings that were found rather than listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from patchbank.pipeline.errors import ManifestError, Problem


@dataclass(frozen=True)
class FoundAudio:
    """The recordings of a folder or a data set, as columns of one length."""

    paths: Sequence[str]
    """Relative to the folder, POSIX; those in containers lead into them."""
    columns: Mapping[str, pa.Array | pa.ChunkedArray] = field(default_factory=dict)
    """`split` and `fold` where they are known, then user columns."""
    labels: Sequence[str | None] | None = None
    """Class names with `;` between them; None where nothing is known of a recording."""


@dataclass(frozen=True)
class ContainerAudio:
    """What one container holds, as columns of one length."""

    members: Sequence[str]
    columns: Mapping[str, pa.ChunkedArray]
    """What the data set says of each besides its labels."""
    labels: Sequence[str | None] | None


def found_error(place: Path, message: str) -> ManifestError:
    """One mistake of a file or folder as a whole."""
    return ManifestError([Problem(str(place), None, None, message)])
