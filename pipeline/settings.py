"""How to extract: all that a person chooses besides the audio, the encoder and the bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.specs import AugmentSpec, StoredDType, WindowSpec


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
    """Clips encoded together; None means 16 on a CPU, 64 on a GPU, or what the bank began with."""
    n_decode_threads: int | None = None
    n_views: int = 0
    """Further rows for every training clip, made by `augment`."""
    augment: AugmentSpec | None = None
    scheduler: str | None = None
    """Address of a Dask scheduler; None starts one worker in this process."""
    preset: str | None = None
    """Convention of the encoder's front end; None is as published."""
    frontend: Mapping[str, Any] = field(default_factory=dict)
    """Constants of the front end that differ from the preset's."""

    def __post_init__(self) -> None:
        if self.augment is not None and not self.n_views:
            raise PatchbankError(
                "found an augmentation and no number of views, expected both: --views 5"
            )
        if self.n_views and self.augment is None:
            raise PatchbankError(
                f"found {self.n_views} views and no augmentation, expected how they are made: "
                "--augment mixup"
            )
