"""Training that can be stopped at any batch, and goes on from there: its state on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from patchbank.pipeline.errors import TrialError
from patchbank.probing.atomic import write_tensors

LEAST_BETWEEN_S = 30.0
"""Of training between two checkpoints."""
MOST_SHARE = 0.05
"""Of the time that goes into writing them."""


@dataclass(frozen=True)
class State:
    """Where training was."""

    arrays: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """Plain JSON."""


class Checkpoint:
    """One file that always holds a whole state: the last one, or the one before.

    `save` is called after every batch and writes where half a minute has passed and writing takes
    less than a twentieth of the time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._next = time.monotonic() + LEAST_BETWEEN_S

    def load(self) -> State | None:
        """What was written last; None where nothing was, `TrialError` where it cannot be read."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise TrialError(
                f"cannot read {self.path} ({error}), expected where training was stopped; remove "
                "that file to begin this stage again"
            ) from error
        return State(arrays, facts)

    def save(self, state: Callable[[], State], *, always: bool = False) -> None:
        """Writes what `state` gives, if it is time or `always`."""
        if not always and time.monotonic() < self._next:
            return
        begun = time.monotonic()
        found = state()
        arrays = {key: value.detach().cpu().contiguous() for key, value in found.arrays.items()}
        facts = {"facts": json.dumps(found.facts)}
        write_tensors(self.path, arrays, facts)
        took_s = time.monotonic() - begun
        self._next = time.monotonic() + max(LEAST_BETWEEN_S, took_s / MOST_SHARE)
