"""Trains the bundled encoder `tiny` on synthetic scenes, without their labels.

Two views of a scene differ in gain, in pitch (mel bands shifted), in what is mixed over them and
in where they sit in time. Each is cut into segments of a few patch steps, and a segment of one
view has to be found, among all segments of the batch, by its counterpart in the other (InfoNCE,
van den Oord et al. 2018). A segment is read as the maximum over its tokens of linear features, so
that what it holds can be seen in single tokens: the way in which prototypes look at them.

Masked-patch prediction of pixels was tried and dropped: after three minutes on one core it stood
far behind this loss and, under prototypes, behind the random initialisation (data/tiny/README.md).

`python -m patchbank.pipeline.pretrain --out data/tiny` repeats the bundled weights' training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float16
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from patchbank.pipeline.encoders.logmel import LogMelSettings, log_mel, mel_power
from patchbank.pipeline.encoders.tiny import LICENCE, TinyConfig, TinyModel, initialise
from patchbank.pipeline.scenes import SceneSettings, make_scene, scene_generator


@dataclass(frozen=True)
class PretrainSettings:
    """The recipe; the defaults are the bundled weights'."""

    seed: int = 0
    n_scenes: int = 12_000
    min_events: int = 3
    max_events: int = 10
    """Denser than the demo's scenes, so that few segments are empty."""
    n_steps: int = 2_200
    batch_size: int = 24
    learning_rate: float = 1e-3
    warmup_steps: int = 60
    weight_decay: float = 0.05
    max_gain_db: float = 10.0
    max_shift_bands: int = 10
    mix_probability: float = 0.7
    min_mix_db: float = -20.0
    max_mix_db: float = 0.0
    segment_steps: int = 4
    """Patch steps, of 160 ms each, in a segment."""
    quiet_power: float = 1.0
    """A segment whose mel power nowhere exceeds this is empty and is not asked for."""
    n_features: int = 512
    embedding_dim: int = 128
    temperature: float = 0.15
    clip_weight: float = 0.2
    """Weight of the same loss on whole clips, read from the CLS token."""


class Head(nn.Module):
    """Embeddings to be compared; thrown away after training."""

    def __init__(self, dim: int, settings: PretrainSettings) -> None:
        super().__init__()
        n_features = settings.n_features
        self.features = nn.Linear(dim, n_features)
        self.embed = nn.Sequential(
            nn.LayerNorm(n_features), nn.ReLU(), nn.Linear(n_features, settings.embedding_dim)
        )

    def forward(self, tokens: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch feature"]:
        """The embedding of each set of tokens, of length one."""
        return F.normalize(self.embed(self.features(tokens).amax(-2)), dim=-1)


def scene_powers(settings: PretrainSettings) -> Float16[Tensor, "clip time freq"]:
    """Mel power of the scenes to learn from; half precision spares memory (64 kB a scene)."""
    scene_settings = SceneSettings(min_events=settings.min_events, max_events=settings.max_events)
    powers = []
    for index in range(settings.n_scenes):
        rng = scene_generator(settings.seed, "pretrain", index)
        waveform = torch.from_numpy(make_scene(rng, scene_settings).waveform)
        powers.append(mel_power(waveform[None], LogMelSettings())[0].half())
    return torch.stack(powers)


def make_view(
    power: Float[Tensor, "batch time freq"], settings: PretrainSettings, rng: torch.Generator
) -> Float[Tensor, "batch time freq"]:
    """Log-mel features of scenes with another scene of the batch over them, louder and shifted."""
    n_clips, n_frames, n_mels = power.shape
    other = power[torch.randperm(n_clips, generator=rng)]
    other = other.roll(_randint(rng, n_frames), 1)
    is_mixed = torch.rand(n_clips, generator=rng) < settings.mix_probability
    mix = is_mixed * _ratio(rng, n_clips, settings.min_mix_db, settings.max_mix_db)
    gain = _ratio(rng, n_clips, -settings.max_gain_db, settings.max_gain_db)
    power = gain[:, None, None] * (power + mix[:, None, None] * other)
    most = settings.max_shift_bands
    shift = torch.randint(-most, most + 1, (n_clips, 1), generator=rng)
    bands = (torch.arange(n_mels) + shift).clamp(0, n_mels - 1)
    shifted = power.gather(2, bands[:, None].expand(-1, n_frames, -1))
    return log_mel(shifted, LogMelSettings())


def _ratio(
    rng: torch.Generator, n_clips: int, low_db: float, high_db: float
) -> Float[Tensor, " batch"]:
    """Power ratios, uniform in decibels."""
    level_db = low_db + (high_db - low_db) * torch.rand(n_clips, generator=rng)
    return torch.as_tensor(10.0 ** (level_db / 10.0))


def _randint(rng: torch.Generator, high: int) -> int:
    return int(torch.randint(high, (1,), generator=rng))


def contrast(
    first: Float[Tensor, "item feature"],
    second: Float[Tensor, "item feature"],
    *,
    is_asked: Bool[Tensor, " item"],
    temperature: float,
) -> Float[Tensor, ""]:
    """InfoNCE both ways, over the asked items; the others serve as negatives only."""
    logits = first @ second.T / temperature
    target = torch.arange(len(logits), device=logits.device)
    losses = F.cross_entropy(logits, target, reduction="none")
    losses = losses + F.cross_entropy(logits.T, target, reduction="none")
    return losses[is_asked].sum() / (2 * is_asked.sum().clamp(min=1))


class Pretraining(nn.Module):
    """The encoder, its two heads and the loss of one batch."""

    def __init__(self, settings: PretrainSettings) -> None:
        super().__init__()
        self.settings = settings
        self.model = TinyModel(TinyConfig())
        self.segment_head = Head(self.model.config.dim, settings)
        self.clip_head = Head(self.model.config.dim, settings)

    def loss(
        self, power: Float[Tensor, "batch time freq"], rng: torch.Generator
    ) -> Float[Tensor, ""]:
        """The second view is rolled by whole patch steps, so that positions tell nothing."""
        rows, n_clips = self.model.config.patch_frames, len(power)
        n_steps = power.shape[1] // rows
        power = power.roll(_randint(rng, power.shape[1]), 1)[:, : n_steps * rows]
        moved, start = _randint(rng, n_steps), _randint(rng, self.settings.segment_steps)
        views = [make_view(power, self.settings, rng) for _ in range(2)]
        tokens = self.model(torch.cat([views[0], views[1].roll(moved * rows, 1)]))[-1]
        steps = tokens[:, 1:].reshape(2 * n_clips, n_steps, -1, tokens.shape[2])
        first, second = steps[:n_clips], steps[n_clips:].roll(-moved, 1)
        is_loud = (power.reshape(n_clips, n_steps, -1) > self.settings.quiet_power).any(2)
        segment_loss = contrast(
            self.segment_head(self._segments(first[:, start:])).flatten(0, 1),
            self.segment_head(self._segments(second[:, start:])).flatten(0, 1),
            is_asked=self._segments(is_loud[:, start:, None]).any(2).flatten(),
            temperature=self.settings.temperature,
        )
        clips = self.clip_head(tokens[:, :1])
        clip_loss = contrast(
            clips[:n_clips],
            clips[n_clips:],
            is_asked=torch.ones(n_clips, dtype=torch.bool, device=power.device),
            temperature=self.settings.temperature,
        )
        return segment_loss + self.settings.clip_weight * clip_loss

    def _segments(self, steps: Tensor) -> Tensor:
        """(batch, time, freq, ...) as (batch, segment, patches of the segment, ...)."""
        length = self.settings.segment_steps
        n_segments = steps.shape[1] // length
        whole = steps[:, : n_segments * length]
        return whole.reshape(len(steps), n_segments, length * steps.shape[2], *steps.shape[3:])


def train(settings: PretrainSettings) -> TinyModel:
    """The encoder after `n_steps` steps; a pure function of `settings` on one thread.

    The defaults take about 20 minutes and 2 GB of memory on one CPU core.
    """
    powers = scene_powers(settings)
    with torch.device("meta"):
        pretraining = Pretraining(settings).to_empty(device="cpu")
    initialise(pretraining, seed=settings.seed)
    optimizer = _optimizer(pretraining, settings)
    rng = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        chosen = torch.randint(len(powers), (settings.batch_size,), generator=rng)
        loss = pretraining.loss(powers[chosen].float(), rng)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(pretraining.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == settings.n_steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return pretraining.model


def learning_rate(step: int, settings: PretrainSettings) -> float:
    """A linear warm-up, then half a cosine down to a hundredth."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / settings.n_steps))
    return settings.learning_rate * warmup * (0.99 * cosine + 0.01)


def _optimizer(pretraining: nn.Module, settings: PretrainSettings) -> torch.optim.Optimizer:
    """AdamW that lets matrices decay, but neither biases nor norms."""
    matrices = [p for p in pretraining.parameters() if p.ndim > 1]
    vectors = [p for p in pretraining.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def save(model: TinyModel, folder: Path, *, settings: PretrainSettings, training_s: float) -> None:
    """Writes `encoder.safetensors` (float16) and, after it, `encoder.json` with the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "encoder.safetensors"
    state = {name: value.half() for name, value in model.state_dict().items()}
    weights.write_bytes(to_safetensors(state))
    card = {
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "licence": LICENCE,
        "config": asdict(model.config),
        "frontend": asdict(LogMelSettings()),
        "recipe": asdict(settings),
        "torch": torch.__version__,
        "training_s": round(training_s),
    }
    (folder / "encoder.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; run as a program it uses one thread, so that a seed repeats its weights."""
    defaults = PretrainSettings()
    parser = argparse.ArgumentParser(
        prog="python -m patchbank.pipeline.pretrain",
        description="Train the bundled encoder on synthetic scenes.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and recipe")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--scenes", type=int, default=defaults.n_scenes)
    parser.add_argument("--steps", type=int, default=defaults.n_steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    options = parser.parse_args(arguments)
    settings = replace(
        defaults,
        seed=options.seed,
        n_scenes=options.scenes,
        n_steps=options.steps,
        batch_size=options.batch_size,
    )
    start_s = time.monotonic()
    model = train(settings)
    save(model, options.out, settings=settings, training_s=time.monotonic() - start_s)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
