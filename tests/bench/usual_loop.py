"""What is written where no patchbank is: a DataLoader, an encoder, one array a clip in HDF5.

`extract.py` calls it with a `LoopJob` as JSON and reads JSON. Worker processes decode and compute
the front end of one clip at a time with torchaudio, the main process encodes batches. No checksums,
no fsync, no resuming.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from patchbank.pipeline import load_encoder

AUDIOMAE_MEAN, AUDIOMAE_DEVIATION, AUDIOMAE_FRAMES = -4.2677393, 4.5689974, 1024
FrontEnd = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LoopJob:
    """What is encoded, and how."""

    encoder: str
    weights: str | None
    device: str
    batch_size: int
    n_workers: int
    table: str
    out: str


def audiomae_features(waveform: Tensor) -> Tensor:
    """Of one clip (sample,), as AudioMAE's dataset.py computes them."""
    from torchaudio.compliance.kaldi import fbank

    frames = fbank(
        (waveform - waveform.mean())[None],
        htk_compat=True,
        sample_frequency=16_000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )
    missing = AUDIOMAE_FRAMES - len(frames)
    frames = torch.nn.functional.pad(frames, (0, 0, 0, missing))
    return (frames - AUDIOMAE_MEAN) / (2 * AUDIOMAE_DEVIATION)


class Clips(Dataset[tuple[str, Tensor]]):
    """Clip ids and features of the rows of a table."""

    def __init__(self, table: Path, front_end: FrontEnd) -> None:
        with table.open(newline="") as file:
            self._rows = [(row["clip_id"], row["path"]) for row in csv.DictReader(file)]
        self._folder, self._front_end = table.parent, front_end

    def __len__(self) -> int:
        return len(self._rows)

    def waveform(self, index: int) -> Tensor:
        samples, _ = soundfile.read(self._folder / self._rows[index][1], dtype="float32")
        return torch.from_numpy(samples)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        return self._rows[index][0], self._front_end(self.waveform(index))


def main() -> None:
    job = LoopJob(**json.loads(sys.argv[1]))
    encoder = load_encoder(job.encoder, weights=job.weights, device=job.device)
    front_end = audiomae_features
    if job.encoder == "efficientat":
        # Its own, on the CPU, one clip at a time.
        own = load_encoder(job.encoder, weights=job.weights, device="cpu")

        def front_end(waveform: Tensor) -> Tensor:
            return own.frontend(waveform[None])[0]

    clips = Clips(Path(job.table), front_end)
    start = time.perf_counter()
    run(job, encoder, clips)
    elapsed_s = time.perf_counter() - start
    check(encoder, clips, job.device)
    print(json.dumps({"n_clips": len(clips), "elapsed_s": elapsed_s}))


def run(job: LoopJob, encoder: Any, clips: Clips) -> None:
    import h5py

    is_cuda = job.device.startswith("cuda")
    last = encoder.spec.layers[-1].layer
    mixed = torch.autocast("cuda", torch.bfloat16) if is_cuda else nullcontext()
    loader = DataLoader(
        clips, batch_size=job.batch_size, num_workers=job.n_workers, pin_memory=is_cuda
    )
    with h5py.File(job.out, "w") as file, torch.no_grad():
        for names, features in loader:
            with mixed:
                found = encoder.encode(features.to(job.device, non_blocking=True), [last])
            tokens = found[last].patches.half().cpu().numpy()
            for name, row in zip(names, tokens, strict=True):
                file.create_dataset(name, data=row)


def check(encoder: Any, clips: Clips, device: str) -> None:
    """Both ways have to compute the same of a clip, or their times say nothing."""
    _, found = clips[0]
    expected = encoder.frontend(clips.waveform(0)[None].to(device))[0].cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def as_argument(job: LoopJob) -> str:
    return json.dumps(asdict(job))


if __name__ == "__main__":
    main()
