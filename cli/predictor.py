"""What `patchbank predict` does, for Python: a trained probe and its encoder, applied to audio.

predictor = Predictor("run")
for row in predictor.audio("recordings/"):
    print(row.clip, row.start_s, row.probabilities)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from patchbank.cli.recordings import recordings
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.encoders import reload_encoder
from patchbank.pipeline.encoders.discovery import is_known
from patchbank.pipeline.environment import choose_device
from patchbank.pipeline.errors import AudioError, EncoderError, TrialError
from patchbank.pipeline.specs import WindowSpec
from patchbank.pipeline.stream import EncodedWindows, TokenStream
from patchbank.probing.artefact import (
    PREDICT_BATCH_SIZE,
    ArrayLike,
    ProbeArtefact,
    load_probe,
)
from patchbank.probing.batch import Batch, Grid, LayerTokens
from patchbank.probing.frames import frame_probe, predict_frames
from patchbank.probing.loader import BatchLoader
from patchbank.probing.mean_source import MeanSource
from patchbank.probing.plan import sequential
from patchbank.probing.run_folder import probe_folder

OnFailure = Callable[[Path, AudioError], None]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a probe says of one window of audio, or of one frame of it."""

    clip: str
    """The path of a recording, or a bank's clip id."""
    start_s: float
    end_s: float
    """Where the window's audio ends: padding is no part of it."""
    probabilities: Float[np.ndarray, " class"]


@dataclass(frozen=True)
class _Window:
    clip: str
    start_s: float
    duration_s: float
    """Seconds of audio in it."""


class Predictor:
    """One probe of a RUN folder, ready to label audio, a bank's clips or waveforms.

    The encoder is loaded when audio is first labelled; with `weights` where the bank's were given
    as a file, `encoder` and `plugin` where encoder or probe are built by a Python file. Raises what
    `load_probe` does, and `BankMismatch` for an encoder other than the one that trained the probe.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        probe: str | None = None,
        weights: str | None = None,
        encoder: str | None = None,
        plugin: str | Path | None = None,
        device: str = "auto",
    ) -> None:
        self.folder = probe_folder(Path(run), probe)
        """The probe's own, within the run."""
        self.artefact = load_probe(self.folder, None if plugin is None else Path(plugin))
        if plugin is not None and not self.artefact.plugin:
            raise TrialError(f"the probe in {self.folder} is built by no file; leave --plugin out")
        self._weights, self._encoder, self._device = weights, encoder, device

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the probabilities."""
        return self.artefact.classes

    def audio(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        frames: bool = False,
        on_failure: OnFailure | None = None,
    ) -> Iterator[Prediction]:
        """One row a window of each recording named, or below a folder named, in order.

        `frames` gives one for each time step of the encoder's tokens instead. Memory holds some
        windows at a time. A recording that cannot be read raises its `AudioError`; where
        `on_failure` is given, that is told, and the next recording follows.
        """
        named = [paths] if isinstance(paths, str | Path) else paths
        stream = self.stream
        probe = self._frame_probe(_grids_of_stream(stream)) if frames else None
        return self._audio(recordings([Path(path) for path in named]), stream, probe, on_failure)

    def _audio(
        self,
        paths: Iterable[Path],
        stream: TokenStream,
        probe: ProbeArtefact | None,
        on_failure: OnFailure | None,
    ) -> Iterator[Prediction]:
        for path in paths:
            try:
                yield from self._encoded(stream.encode(path), str(path), probe)
            except AudioError as error:
                if on_failure is None:
                    raise
                on_failure(path, error)

    def waveform(
        self,
        samples: ArrayLike,
        sample_rate_hz: int,
        *,
        frames: bool = False,
    ) -> Iterator[Prediction]:
        """The same of waveforms in memory, (batch, sample); `clip` is the row's number, "0" ..."""
        rows = np.asarray(samples, dtype=np.float32)
        if rows.ndim != 2 or not rows.size:
            raise TrialError(f"found samples of shape {rows.shape}, expected (batch, sample)")
        if not np.isfinite(rows).all():
            raise TrialError("found samples that are NaN or infinite, expected audio")
        stream = self.stream
        probe = self._frame_probe(_grids_of_stream(stream)) if frames else None
        return (
            one
            for index, row in enumerate(rows)
            for one in self._encoded(
                stream.encode_samples(row, sample_rate_hz, name=str(index)), str(index), probe
            )
        )

    def bank(self, bank: str | Path | Bank, *, frames: bool = False) -> Iterator[Prediction]:
        """One row a clip of a bank that has tokens, or a frame of it; its views are left out."""
        opened = bank if isinstance(bank, Bank) else open_bank(bank)
        self.artefact.check_encoder(opened.card["encoder"], opened.encoder_id)
        grids = {layer: (grid.time, grid.freq) for layer, grid in opened.schema.grids.items()}
        probe = self._frame_probe(grids) if frames else None
        return self._bank(opened, probe)

    def _bank(self, bank: Bank, probe: ProbeArtefact | None) -> Iterator[Prediction]:
        names = ["clip_id", "view", "start_s", "duration_s"]
        clips = bank.clips.select(names).to_pylist()
        is_clean = np.array([clip["view"] == 0 for clip in clips])
        chosen = np.flatnonzero((bank.status == 1) & is_clean)
        layers = self.artefact.layers
        grid = bank.schema.grids[layers[-1] if layers else bank.layers[-1]]
        window_s = float(bank.card["window"]["window_s"])
        for batch in self._batches(bank, chosen, frames=probe is not None):
            found = [clips[row] for row in np.asarray(batch.rows).tolist()]
            windows = [_Window(c["clip_id"], c["start_s"], c["duration_s"]) for c in found]
            yield from self._rows(windows, batch, (grid.time, grid.freq), window_s, probe)

    def _batches(self, bank: Bank, rows: np.ndarray, *, frames: bool) -> Iterable[Batch]:
        layers = self.artefact.layers
        if bank.schema.holds_tokens or frames:
            return BatchLoader(bank, layer=layers, rows=rows, shuffle=False, reads_once=True)
        means = MeanSource(bank, layers or bank.layers[-1:], rows=rows)
        means.check({self.artefact.probe: self.artefact.family})
        return means.read(sequential(rows, batch_size=PREDICT_BATCH_SIZE))

    def _encoded(
        self, encoded: Iterable[EncodedWindows], clip: str, probe: ProbeArtefact | None
    ) -> Iterator[Prediction]:
        for some in encoded:
            windows = [_Window(clip, one.start_s, one.duration_s) for one in some.windows]
            grid = list(some.layers.values())[-1].grid
            window_s = float(self.artefact.window["window_s"])
            yield from self._rows(windows, batch_of(some), (grid.time, grid.freq), window_s, probe)

    def _rows(
        self,
        windows: Sequence[_Window],
        batch: Batch,
        grid: Grid,
        window_s: float,
        probe: ProbeArtefact | None,
    ) -> Iterator[Prediction]:
        if probe is None:
            for one, scores in zip(windows, self.artefact.predict_batch(batch), strict=True):
                yield Prediction(one.clip, one.start_s, one.start_s + one.duration_s, scores)
            return
        step_s = window_s / grid[0]
        # Of a frame that holds but a rounding error of audio, nothing is left.
        n_times = [max(1, math.ceil(one.duration_s / step_s - 1e-6)) for one in windows]
        found = predict_frames(probe, batch, grid, n_times=np.array(n_times))
        for clip, time, scores in zip(found.clips, found.times, found.probabilities, strict=True):
            one = windows[int(clip)]
            end_s = min((int(time) + 1) * step_s, one.duration_s)
            yield Prediction(
                one.clip, one.start_s + int(time) * step_s, one.start_s + end_s, scores
            )

    def _frame_probe(self, grids: Mapping[int, Grid]) -> ProbeArtefact:
        layers = self.artefact.layers or tuple(grids)[-1:]
        found = {layer: grids.get(layer) for layer in layers}
        if len(set(found.values())) > 1:
            stated = ", ".join(f"{grid} in layer {layer}" for layer, grid in found.items())
            raise TrialError(
                f"found grids {stated}, expected one (time, freq) grid in layers that are mixed; "
                "predict without --frames"
            )
        return frame_probe(self.artefact, found[layers[-1]])

    @cached_property
    def stream(self) -> TokenStream:
        """The probe's encoder and its bank's settings."""
        return open_stream(
            self.artefact, weights=self._weights, encoder=self._encoder, device=self._device
        )


def open_stream(
    artefact: ProbeArtefact, *, weights: str | None, encoder: str | None, device: str
) -> TokenStream:
    """The encoder and the settings of a probe's bank.

    Raises `BankMismatch` for other weights, `TrialError` for a probe that comes from no bank.
    """
    artefact.check_origin()
    chosen, name = choose_device(device), artefact.encoder["name"]
    if encoder is None and not is_known(name):
        raise EncoderError(
            f"this probe was trained on tokens of {name!r}, which is neither shipped nor "
            "installed here; give the file that made its bank: --encoder FILE.py"
        )
    model = reload_encoder(artefact.encoder, weights=weights, device=chosen, encoder=encoder)
    artefact.check_encoder(model.spec.identity(), model.spec.encoder_id)
    return TokenStream(
        encoder=model,
        layers=artefact.layers,
        window=WindowSpec(**artefact.window),
        stored_dtype=artefact.tokens["stored_dtype"],
        mask_padding=artefact.tokens["mask_padding"],
        device=chosen,
    )


def _grids_of_stream(stream: TokenStream) -> dict[int, Grid]:
    n_samples = stream.window.n_samples(stream.encoder.spec.sample_rate_hz)
    grids = stream.encoder.grids(n_samples)
    return {layer: (grid.time, grid.freq) for layer, grid in grids.items()}


def batch_of(encoded: EncodedWindows) -> Batch:
    """The tokens of some windows as a loader hands out those of a bank."""
    layers = {
        layer: LayerTokens(
            torch.from_numpy(found.patches),
            None if found.prefix is None else torch.from_numpy(found.prefix),
            torch.from_numpy(found.n_patches),
        )
        for layer, found in encoded.layers.items()
    }
    return Batch(np.arange(len(encoded.windows)), layers)
