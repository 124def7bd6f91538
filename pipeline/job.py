"""What a worker is told: the job of an extraction, and what it reports of it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from patchbank.pipeline.bank.card import read_attributes, recipe_of_card
from patchbank.pipeline.bank.schema import BankSchema
from patchbank.pipeline.encoders import reload_encoder
from patchbank.pipeline.encoders.base import Encoder
from patchbank.pipeline.encoders.discovery import is_file
from patchbank.pipeline.encoders.hub import is_remote
from patchbank.pipeline.errors import (
    BankError,
    BankMismatch,
    EncoderError,
    ManifestError,
    Problem,
)
from patchbank.pipeline.specs import DecodeIn, Json, Recipe, differing_fields
from patchbank.pipeline.stages import StageTimes


@dataclass(frozen=True)
class ExtractionJob:
    """All that a worker needs besides the rows; it travels to the workers."""

    bank: Path
    folder: Path
    """Where shards are committed: the bank, or a growth's folder inside it."""
    audio_root: Path
    encoder: str
    """What `load_encoder` takes: a name, or the absolute path of a file."""
    recipe: Recipe
    schema: BankSchema
    weights: str | None
    """`hf:org/repo@commit`, or an absolute path."""
    device: str
    n_decode_threads: int | None = None
    n_threads: int | None = None
    """Cores that a worker on a CPU encodes with; None of either is what its machine has."""
    decode_in: DecodeIn = "threads"
    compiles: bool = False
    """Whether the encoder goes through `torch.compile`."""

    def load_encoder(self, device: str) -> Encoder:
        """The job's encoder; raises what is wrong where this machine has another or none."""
        self._check_machine()
        expected = self.recipe.encoder.identity()
        encoder = reload_encoder(
            expected, weights=self.weights, device=device, encoder=self.encoder
        )
        found = encoder.spec.identity()
        if found != expected:
            raise BankMismatch(
                f"{self.encoder} with {self.weights or 'no weights'} is another encoder here",
                differing_fields(found, expected),
            )
        return encoder

    def _check_machine(self) -> None:
        if not self.audio_root.is_dir():
            raise not_seen(self.audio_root, "--audio-root")
        if self.weights and not is_remote(self.weights) and not Path(self.weights).exists():
            raise EncoderError(
                f"{socket.gethostname()} finds no weights at {self.weights}; every worker needs "
                "them under that path"
            )
        if is_file(self.encoder) and not Path(self.encoder).is_file():
            raise EncoderError(
                f"{socket.gethostname()} finds no encoder at {self.encoder}; every worker needs "
                "the file under that path"
            )

    def check_visible(self) -> None:
        """Raises `BankError` where the job's bank does not lie on this machine's disk."""
        if not (self.folder / "zarr.json").is_file():
            raise BankError(
                f"{socket.gethostname()} sees no bank at {self.folder}: --out must lie on a "
                "disk that all workers share, under the same path"
            )
        card = read_attributes(self.folder)["card"]
        found, expected = (
            _without_constants(recipe) for recipe in (recipe_of_card(card), self.recipe.identity())
        )
        if found != expected:
            raise BankMismatch(
                f"another bank lies at {self.folder} now; run the command again",
                differing_fields(found, expected),
            )


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard's clips."""

    shard: int
    n_done: int
    n_failed: int
    worker: str = ""
    """Who has done it."""
    times: StageTimes = field(default_factory=StageTimes)
    """What the worker did since its last report, for this shard and for others."""


def not_seen(audio_root: Path, what: str) -> ManifestError:
    """The error of a worker that finds no audio where it should be."""
    message = f"{socket.gethostname()} finds no audio there; every worker needs it under that path"
    return ManifestError([Problem(str(audio_root), None, None, f"{what}: {message}")])


def _without_constants(recipe: Json) -> Json:
    """A recipe as it is before anything was measured, which is what a job knows."""
    quantisation: Mapping[str, object] = recipe["quantisation"]
    kept = {name: value for name, value in quantisation.items() if name != "constants_sha256"}
    return recipe | {"quantisation": kept}
