"""Which encoders the benchmark of extraction runs, and what writes their weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from extract_audio import AudioPool
from full_size import BASE
from published_files import random_state, vit_shapes

SHARED = Path(os.environ.get("PATCHBANK_SHARED", Path(__file__).parents[3] / "shared"))
MN04 = "mn04_as_mAP_432.pt"
SMALL = {"dim": 384, "depth": 12, "hidden": 1_536}
TINY = {"dim": 128, "depth": 2, "hidden": 256}
TIMES = 64
"""Time patches of AudioMAE: 512 tokens of ten seconds."""
NULL_ENCODER = '''"""An encoder that computes nothing: the same 512 x 768 tokens for every clip."""

import hashlib

import torch

from patchbank.pipeline.encoders.plugin import RESAMPLER, EncoderSpec, Grid, LayerSpec, TokenMap

GRID, DIM = Grid(64, 8), 768


class NullEncoder:
    def __init__(self, device):
        self.tokens = torch.randn(GRID.n_patches, DIM, generator=torch.Generator().manual_seed(0))
        self.batches = {}
        self.spec = EncoderSpec(
            name="null",
            weights_sha256=hashlib.sha256(b"null").hexdigest(),
            sample_rate_hz=16_000,
            config={},
            frontend={},
            resampler=RESAMPLER,
            layers=(LayerSpec(1, "made up", DIM),),
            licence="Apache-2.0",
            source="tests/bench of patchbank",
        )
        self.to(device)

    def grids(self, n_samples):
        return {1: GRID}

    def frontend(self, waveform):
        return waveform[:, :1]

    def encode(self, features, layers=None):
        n_clips = len(features)
        if n_clips not in self.batches:
            self.batches[n_clips] = self.tokens.expand(n_clips, -1, -1).contiguous()
        return {1: TokenMap(self.batches[n_clips], None, GRID)}

    def to(self, device):
        self.tokens = self.tokens.to(device)
        self.batches = {}
        return self


def load(weights, device):
    return NullEncoder(device)
'''


@dataclass(frozen=True)
class Case:
    """An encoder, the audio it is fed, and the banks that are made of it."""

    name: str
    encoder: str
    audio: AudioPool
    write_weights: Callable[[Path], Path] | None = None
    """Writes them into a folder; None where the encoder needs none."""
    dtypes: tuple[str, ...] = ("float16",)
    is_encoder: bool = True
    """False of what computes nothing and shows what the rest sustains."""


def cases(
    folder: Path, *, device: str, weights: Path | None, n_files: int, quick: bool
) -> Iterator[Case | str]:
    """The cases of a device; a line of text for what is left out."""
    flac = AudioPool(folder / "flac-16k", 16_000, "flac", n_files)
    if device.startswith("cuda"):
        sizes = TINY if quick else BASE
        dtypes = ("float16", "int8")
        yield Case("vit-b", "audiomae", flac, _audiomae(sizes), dtypes)
    else:
        wav = AudioPool(folder / "wav-32k", 32_000, "wav", n_files)
        write = _efficientat(weights, quick=quick)
        mn04 = Case("mn04", "efficientat", wav, write) if callable(write) else None
        yield mn04 or f"mn04 is left out: {write}"
        yield Case("vit-s", "audiomae", flac, _audiomae(TINY if quick else SMALL))
    null = folder / "null_encoder.py"
    null.write_text(NULL_ENCODER)
    yield Case("ceiling", str(null), flac, is_encoder=False)


def _audiomae(sizes: dict[str, int]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"audiomae-{sizes['dim']}x{sizes['depth']}.pth"
        if not path.is_file():
            torch.save({"model": random_state(vit_shapes(TIMES, **sizes))}, path)
        return path

    return write


def _efficientat(weights: Path | None, *, quick: bool) -> Callable[[Path], Path] | str:
    """What gives the weights: the file asked for, the published one, or random ones."""
    found = weights or next(iter(sorted(SHARED.glob(f"weights/**/{MN04}"))), None)
    if found is not None and not (quick and weights is None):
        return lambda _: found
    try:
        from test_efficientat import random_state as random_mn
    except ImportError as error:
        return f"no {MN04} under {SHARED}/weights, and random weights need {error.name}"

    def write(folder: Path) -> Path:
        path = folder / f"mn{'01' if quick else '04'}_random.pt"
        if not path.is_file():
            torch.save(random_mn(0.1 if quick else 0.4), path)
        return path

    return write
