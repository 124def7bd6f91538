"""How to extract: all that a person chooses besides the audio, the encoder and the bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.specs import (
    AugmentSpec,
    ComputeDType,
    DecodeIn,
    StoredDType,
    WindowSpec,
)


@dataclass(frozen=True)
class ExtractionSettings:
    """How to extract; the defaults of the command line."""

    window: WindowSpec = field(default_factory=WindowSpec)
    layers: str | tuple[int, ...] = "last"
    """"last", "all", or 1-based layers."""
    stored_dtype: StoredDType = "float16"
    mask_padding: bool = False
    device: str = "auto"
    batch_size: int | None = None
    """Clips encoded together; None is what the bank began with, else 4 on a CPU, and on a GPU 64,
    halved until they fit."""
    compute_dtype: ComputeDType | None = None
    """What the encoder computes in; None is what the bank began with, else bfloat16 on a GPU that
    has it and float32 elsewhere."""
    compiles: bool = False
    """Whether the encoder goes through `torch.compile`."""
    decode_in: DecodeIn = "threads"
    n_decode_threads: int | None = None
    n_views: int = 0
    """Further rows for every training clip, made by `augment`."""
    augment: AugmentSpec | None = None
    scheduler: str | None = None
    """Address of a Dask scheduler; None works on this machine."""
    devices: str | None = None
    """"all" or "cuda:0,cuda:2": a worker for each; None is one worker, on `device`."""
    n_workers: int | None = None
    """CPU workers that share the cores."""
    n_threads: int | None = None
    """Cores that a worker computes with; None shares them evenly."""
    preset: str | None = None
    """Convention of the encoder's front end; None is as published."""
    frontend: Mapping[str, Any] = field(default_factory=dict)
    """Constants of the front end that differ from the preset's."""

    def __post_init__(self) -> None:
        self._check_workplace()
        if self.augment is not None and not self.n_views:
            raise PatchbankError(
                "found an augmentation and no number of views, expected both: --views 5"
            )
        if self.n_views and self.augment is None:
            raise PatchbankError(
                f"found {self.n_views} views and no augmentation, expected how they are made: "
                "--augment mixup"
            )

    def _check_workplace(self) -> None:
        chosen = {
            "--devices": self.devices,
            "--workers": self.n_workers,
            "--threads": self.n_threads,
        }
        here = [f"{name} {value}" for name, value in chosen.items() if value is not None]
        several = self.devices is not None or self.n_workers is not None
        if several and self.device != "auto":
            raise PatchbankError(
                f"found --device {self.device} and {here[0]}, expected one of them: --device is "
                "where a single worker computes"
            )
        if here and self.scheduler is not None:
            raise PatchbankError(
                f"found --scheduler and {here[0]}, expected one of them: its workers are started "
                f"with `patchbank worker {self.scheduler} {here[0]}`"
            )
