"""A job's encoder on its device: waveforms in, tokens as the bank stores them out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float32
from torch import Tensor

from patchbank.pipeline.bank.quantised import ChannelConstants
from patchbank.pipeline.bank.schema import BankSchema, TokenArray
from patchbank.pipeline.encoders.base import Encoder, TokenMap, features_of
from patchbank.pipeline.encoders.frontend import full_precision
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import Recipe
from patchbank.pipeline.stages import ENCODER, FRONT_END, QUANTISE, StageClock
from patchbank.pipeline.tokens import DeviceConstants, PackedTokens, counted_patches, pack_tokens

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""What an encoder may compute in besides float32; its front end never does."""


@runtime_checkable
class Marks(Protocol):
    """Times the steps of a batch."""

    def after(self, stage: str) -> None:
        """What was asked of the device since the last mark belongs to `stage`."""
        ...


class ClockMarks:
    """Of a device that has done its work when the call returns."""

    def __init__(self, clock: StageClock) -> None:
        self._clock, self._last_s = clock, time.perf_counter()

    def after(self, stage: str) -> None:
        now_s = time.perf_counter()
        self._clock.add(stage, now_s - self._last_s)
        self._last_s = now_s


class Encoding:
    """What is done with a batch of waveforms; any thread may, and batches know nothing of others.

    `constants` are asked for by the first batch of a quantised bank, after its calibration.
    """

    def __init__(
        self,
        encoder: Encoder,
        recipe: Recipe,
        schema: BankSchema,
        *,
        device: str,
        constants: Callable[[], Mapping[int, ChannelConstants]],
        compiles: bool = False,
    ) -> None:
        self.encoder, self.recipe, self.schema, self.device = encoder, recipe, schema, device
        self.n_samples = recipe.window.n_samples(recipe.encoder.sample_rate_hz)
        self.grids = encoder.grids(self.n_samples)
        self._ask_constants = constants
        self._constants: dict[int, DeviceConstants] | None = None
        # Shorter batches, the last ones of shards, would be compiled once more for each length.
        # By default a GPU's kernels are chosen by timing, and last bits differ between runs.
        self._compiled = (
            torch.compile(encoder.encode, dynamic=False, options={"deterministic": True})
            if compiles
            else None
        )

    def full_batch(self, batch_size: int) -> int:
        """Clips of all batches of a shard but its last: a small bank has shards below a batch."""
        return min(batch_size, self.schema.rows_per_shard)

    def try_batch(self, size: int, marks: Marks) -> None:
        """Takes the memory that a batch takes, but for codes, whose constants are not known yet."""
        waveforms = torch.zeros(size, self.n_samples, device=self.device)
        n_audio: list[int | None] = [None] * size
        maps = self.maps(waveforms, n_audio, marks)
        if not self.schema.stored.is_quantised:
            self.pack(maps, n_audio, marks)

    @torch.no_grad()
    def maps(
        self,
        waveforms: Float32[Tensor, "batch sample"],
        n_audio: Sequence[int | None],
        marks: Marks,
        *,
        is_full: bool = False,
    ) -> dict[int, TokenMap]:
        """Tokens of clips on the device, of which so many samples are audio; None: all."""
        lengths = [self.n_samples if n is None else n for n in n_audio]
        pads_zeros = self.recipe.window.pad == "zero"
        features = features_of(self.encoder, waveforms, lengths if pads_zeros else None)
        marks.after(FRONT_END)
        encode = self._compiled if self._compiled is not None and is_full else self.encoder.encode
        with self._autocast():
            maps = encode(features, self.recipe.layers)
        marks.after(ENCODER)
        for layer, tokens in maps.items():
            if tokens.grid != self.grids[layer]:
                raise EncoderError(
                    f"layer {layer}: found grid {tokens.grid}, expected {self.grids[layer]}"
                )
        return maps

    @torch.no_grad()
    def pack(
        self, maps: Mapping[int, TokenMap], n_audio: Sequence[int | None], marks: Marks
    ) -> dict[str, PackedTokens]:
        """The tokens of every array of the bank, by its suffix, still on the device."""
        constants = self._on_device()
        packed = {}
        for array in self.schema.arrays():
            counts = [
                array.n_tokens if array.kind == "prefix" else self.counted(array.layer, n)
                for n in n_audio
            ]
            packed[array.column_suffix] = pack_tokens(
                tokens_of(maps, array),
                stored=array.stored,
                n_counted=torch.tensor(counts),
                constants=constants.get(array.layer),
            )
        marks.after(QUANTISE)
        return packed

    def counted(self, layer: int, n_audio_samples: int | None) -> int:
        """Patches of a clip that count."""
        return counted_patches(
            self.encoder,
            self.grids[layer],
            n_audio_samples=self.n_samples if n_audio_samples is None else n_audio_samples,
            n_samples=self.n_samples,
            mask_padding=self.recipe.mask_padding,
        )

    def _autocast(self) -> AbstractContextManager[object]:
        kind = torch.device(self.device).type
        dtype = COMPUTE_DTYPES.get(self.recipe.compute_dtype)
        if dtype is not None:
            return torch.autocast(kind, dtype=dtype)
        return full_precision(torch.device(self.device)) if kind == "cuda" else nullcontext()

    def _on_device(self) -> dict[int, DeviceConstants]:
        # Two threads may both come first; they make the same.
        if self._constants is None:
            self._constants = {
                layer: DeviceConstants(constants, self.device)
                for layer, constants in self._ask_constants().items()
            }
        return self._constants


def tokens_of(maps: Mapping[int, TokenMap], array: TokenArray) -> Tensor:
    """The tokens of one array; `EncoderError` where the encoder has no such tokens."""
    tokens = maps[array.layer].patches if array.kind == "patches" else maps[array.layer].prefix
    if tokens is None:
        raise EncoderError(f"layer {array.layer} has no prefix tokens, expected {array.n_tokens}")
    return tokens
