"""Front end, encoder and probe as one `torch.export` program, checked against `predict`.

The program is a plain graph of PyTorch's own operators: whoever loads it needs torch alone.
"""

from __future__ import annotations

import json
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchbank.cli.bars import phase
from patchbank.cli.predictor import batch_of
from patchbank.pipeline.bank.dtypes import STORED_TYPES, prefix_type
from patchbank.pipeline.encoders.base import Encoder, TokenMap
from patchbank.pipeline.errors import AudioError, EncoderError
from patchbank.pipeline.stream import TokenStream
from patchbank.pipeline.tokens import FLOAT_DTYPES, counted_patches
from patchbank.probing.artefact import ProbeArtefact
from patchbank.probing.calibration import probabilities_of
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.tokens import Tokens

METADATA = "patchbank.json"
"""Name of the extra file inside the program's archive."""
EXAMPLE_CLIPS = 2
"""Clips of the batch that is traced; one alone would be taken for the only size."""
BOUND = 1e-4
"""Largest difference in probability that is taken for rounding. A last bit of float32 may turn a
token's last bit of float16; 2.5e-5 is the most that was found, on real audio."""


class ExportableModel(nn.Module):
    """Waveforms of one window's length in, the probabilities that `predict` gives out."""

    def __init__(self, artefact: ProbeArtefact, stream: TokenStream) -> None:
        super().__init__()
        self._artefact, self._stream = artefact, stream
        self.n_samples = stream.window.n_samples(stream.encoder.spec.sample_rate_hz)
        shape = replace(artefact.shape, n_classes=len(artefact.classes))
        self._probe = build_probe(artefact.plugin or artefact.probe, shape, artefact.options)
        self.encoder_parts = nn.ModuleList(modules_of(stream.encoder)).eval().requires_grad_(False)
        # Names of arrays may have dots, those of buffers may not.
        self._names = {name: f"probe_{i}" for i, name in enumerate(artefact.weights)}
        for name, place in self._names.items():
            self.register_buffer(place, artefact.weights[name].float().clone())

    def forward(self, waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch class"]:
        encoder, layers = self._stream.encoder, self._stream.layers
        maps = encoder.encode(encoder.frontend(waveform), layers)
        *others, last = (self._tokens(maps[layer]) for layer in layers)
        tokens = last.after(others) if others else last
        weights = {name: getattr(self, place)[None] for name, place in self._names.items()}
        return probabilities(self._artefact, self._probe.logits(weights, tokens)[0])

    def _tokens(self, found: TokenMap) -> Tokens:
        """One layer rounded as the bank's tokens are, with the patches that count."""
        stored = FLOAT_DTYPES[rounded_to(self._stream)]
        n_counted = counted_patches(
            self._stream.encoder,
            found.grid,
            n_audio_samples=self.n_samples,
            n_samples=self.n_samples,
            mask_padding=self._stream.mask_padding,
        )
        patches = found.patches.to(stored).float()
        prefix = None if found.prefix is None else found.prefix.to(stored).float()
        counts = torch.full((patches.shape[0],), n_counted, device=patches.device)
        return Tokens(patches, prefix, counts)


def probabilities(
    artefact: ProbeArtefact, logits: Float[Tensor, "batch class"]
) -> Float[Tensor, "batch class"]:
    """What `ProbeArtefact.predict_batch` makes of logits."""
    return probabilities_of(
        logits, multi_label=artefact.multi_label, temperature=artefact.temperature
    )


def rounded_to(stream: TokenStream) -> str:
    """The float type that tokens are rounded to before a probe sees them."""
    return prefix_type(STORED_TYPES[stream.stored_dtype]).name


def modules_of(encoder: Encoder) -> list[nn.Module]:
    """The modules that an encoder is made of: what holds its weights."""
    if isinstance(encoder, nn.Module):
        return [encoder]
    return [part for part in vars(encoder).values() if isinstance(part, nn.Module)]


@dataclass(frozen=True)
class ExportCheck:
    """How far a program that was written and loaded again is from `predict`."""

    largest_difference: float
    """In probability, over all waveforms, classes and batch sizes."""
    bound: float
    waveforms: tuple[str, ...]
    batch_sizes: tuple[int, ...]


@torch.no_grad()
def write_program(
    artefact: ProbeArtefact, stream: TokenStream, out: Path, *, any_batch: bool
) -> ExportCheck:
    """Writes `out` where the program, loaded again, gives what `predict` gives.

    Takes any number of clips, or with `any_batch=False` one. Raises `EncoderError` where encoder
    or probe cannot be exported, or where the program differs: then an older file stays as it is.
    """
    model = ExportableModel(artefact, stream).eval()
    with phase("trace front end, encoder and probe"):
        program = traced(model, any_batch=any_batch)
    # In a folder of its own: a program is called in its archive as its file was.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
        draft = Path(folder) / out.name
        save_program(program, draft, metadata(artefact, stream))
        with phase("compare the program with predict"):
            written, _ = load_program(draft)
            check = compared(written, artefact, stream, (1, 3) if any_batch else (1,))
        if not check.largest_difference <= check.bound:
            raise EncoderError(
                f"the exported program differs from predict by {check.largest_difference:.1e}, "
                f"expected at most {check.bound:g}; {out} is not written: use patchbank predict"
            )
        draft.replace(out)
    return check


def traced(model: ExportableModel, *, any_batch: bool) -> torch.export.ExportedProgram:
    """The program of a model; `EncoderError` with the reason where there is none."""
    example = torch.zeros(EXAMPLE_CLIPS if any_batch else 1, model.n_samples)
    batch = {0: torch.export.Dim("batch", min=1)} if any_batch else None
    # What is computed once and kept is to be made of numbers, not of the shapes of a trace.
    model(example)
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=(batch,), strict=False)
    except Exception as error:
        # Whatever somebody's encoder or probe does that no graph can hold.
        raise EncoderError(_why_not(model, error, any_batch=any_batch)) from error
    # They would lie in the archive as a pickle, and be all of it that is one.
    program.example_inputs = None
    return program


def _why_not(model: ExportableModel, error: Exception, *, any_batch: bool) -> str:
    name, probe = model._stream.encoder.spec.name, model._artefact.probe
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if "site-packages" not in one.filename and one.name != "traced"]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own[1:] else ""
    reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    advice = (
        "try --batch 1, or label with patchbank predict" if any_batch else "use patchbank predict"
    )
    return f"cannot export {name} with probe {probe!r}: {reason[:300]}{place}; {advice}"


def save_program(program: torch.export.ExportedProgram, path: Path, facts: dict[str, Any]) -> None:
    """One archive: graph, weights, and the facts as `METADATA`."""
    with warnings.catch_warnings():
        # Said of a transposed filter bank, which is all of its memory though not in order.
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        extra = {METADATA: json.dumps(facts, indent=1)}
        torch.export.save(program, path, extra_files=extra)


def load_program(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A program that was written, and what its archive says of it."""
    extra = {METADATA: ""}
    with warnings.catch_warnings():
        # PyTorch maps the archive and only reads it.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra[METADATA])


def metadata(artefact: ProbeArtefact, stream: TokenStream) -> dict[str, Any]:
    """What a reader of the program has to know, and where it comes from."""
    rate = stream.encoder.spec.sample_rate_hz
    return {
        "classes": list(artefact.classes),
        "multi_label": artefact.multi_label,
        "thresholds": list(artefact.thresholds),
        "temperature": artefact.temperature,
        "sample_rate_hz": rate,
        "n_samples": stream.window.n_samples(rate),
        "window": artefact.window,
        "probe": artefact.probe,
        "options": artefact.options,
        "encoder": artefact.encoder.get("name", ""),
        "encoder_id": artefact.encoder_id,
        "layers": list(artefact.layers),
        "stored_dtype": stream.stored_dtype,
        "bank": artefact.training.get("bank", ""),
        "patchbank": version("patchbank"),
        "torch": torch.__version__,
    }


def compared(
    program: nn.Module, artefact: ProbeArtefact, stream: TokenStream, batch_sizes: Sequence[int]
) -> ExportCheck:
    """The largest difference between a program and `predict`, on made waveforms."""
    made = waveforms(stream)
    told = {name: predicted(artefact, stream, one) for name, one in made.items()}
    expected = {name: found for name, found in told.items() if found is not None}
    names = list(expected)
    if not names:
        raise EncoderError("predict takes none of the waveforms that a program is checked with")
    difference = 0.0
    for size in batch_sizes:
        for first in range(len(names)):
            # Each waveform in each place of a batch, beside others.
            batch = [names[(first + place) % len(names)] for place in range(size)]
            found = program(torch.from_numpy(np.stack([made[name] for name in batch])))
            wanted = np.stack([expected[name] for name in batch])
            difference = max(difference, float(np.abs(found.numpy() - wanted).max(initial=0.0)))
            if not np.isfinite(found.numpy()).all():
                difference = float("inf")
    return ExportCheck(difference, BOUND, tuple(names), tuple(batch_sizes))


def waveforms(stream: TokenStream) -> dict[str, np.ndarray]:
    """Noise, silence, a tone and a rising one of a window's length, float32."""
    rate = stream.encoder.spec.sample_rate_hz
    n_samples = stream.window.n_samples(rate)
    time_s = np.arange(n_samples) / rate
    random = np.random.default_rng(0)
    made = {
        "noise": 0.1 * random.standard_normal(n_samples),
        "silence": np.zeros(n_samples),
        "tone": 0.3 * np.sin(2 * np.pi * 440.0 * time_s),
        "sweep": 0.3 * np.sin(2 * np.pi * rate / 8 * time_s**2 / time_s[-1]),
    }
    return {name: one.astype(np.float32) for name, one in made.items()}


def predicted(
    artefact: ProbeArtefact, stream: TokenStream, waveform: Float[np.ndarray, " sample"]
) -> Float[np.ndarray, " class"] | None:
    """What `predict` says of a recording of that waveform; None where it refuses it."""
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "waveform.wav"
        soundfile.write(path, waveform, stream.encoder.spec.sample_rate_hz, subtype="FLOAT")
        try:
            encoded = next(stream.encode(path))
        except AudioError:
            return None
    found: np.ndarray = artefact.predict_batch(batch_of(encoded))[0]
    return found
