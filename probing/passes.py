"""Passes over a bank: one read of the tokens feeds every trial of every family."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchbank.probing.batch import TokenSource
from patchbank.probing.losses import LOSSES, Loss, asymmetric
from patchbank.probing.optimiser import cosine_factor
from patchbank.probing.plan import Rows, batches, sequential
from patchbank.probing.probes.tokens import Buffers, convert
from patchbank.probing.settings import TrainSettings
from patchbank.probing.trials import TrialStack


@dataclass(frozen=True)
class Progress:
    """An epoch has ended."""

    stage: str
    """What the pass is for: "search" or "final", after the fold where there are folds."""
    epoch: int
    """1-based."""
    n_epochs: int
    losses: dict[str, float]
    """The lowest mean training loss of each probe's trials; infinite where all diverged."""


OnProgress = Callable[[Progress], None]


def choose_loss(settings: TrainSettings, *, multi_label: bool) -> Loss:
    """The loss that the settings name, with its constants."""
    name = settings.loss
    if name == "auto":
        name = "asymmetric" if multi_label else "cross-entropy"
    if name != "asymmetric":
        return LOSSES[name]
    return functools.partial(
        asymmetric,
        gamma_negative=settings.gamma_negative,
        gamma_positive=settings.gamma_positive,
        clip=settings.clip,
    )


def fit_stacks(
    stacks: Sequence[TrialStack],
    source: TokenSource,
    targets: Float[np.ndarray, "clip class"],
    rows: Rows,
    *,
    loss: Loss,
    settings: TrainSettings,
    stage: str = "train",
    progress: OnProgress | None = None,
) -> None:
    """Trains all stacks on `rows`, reading them once an epoch in an order all trials share."""
    truth = torch.from_numpy(targets).to(settings.torch_device, settings.torch_dtype)
    n_batches = -(-len(rows) // settings.batch_size)
    n_steps, step, buffers = n_batches * settings.n_epochs, 0, Buffers()
    for epoch in range(settings.n_epochs):
        plan = batches(rows, batch_size=settings.batch_size, seed=settings.order_seed, epoch=epoch)
        totals = [torch.zeros(len(stack.trials), device=truth.device) for stack in stacks]
        for batch in source.read(plan):
            tokens = convert(batch, dtype=truth.dtype, device=truth.device, buffers=buffers)
            wanted = truth[torch.from_numpy(np.asarray(batch.rows, dtype=np.int64))]
            factor = cosine_factor(step, n_steps=n_steps, n_warmup_steps=settings.n_warmup_steps)
            for stack, total in zip(stacks, totals, strict=True):
                total += stack.step(tokens, wanted, loss, factor=factor)
            step += 1
        if progress is not None:
            losses = _lowest(stacks, totals, n_batches)
            progress(Progress(stage, epoch + 1, settings.n_epochs, losses))


def _lowest(
    stacks: Sequence[TrialStack], totals: Sequence[Tensor], n_batches: int
) -> dict[str, float]:
    return {
        stack.name: float(total.nan_to_num(nan=math.inf).min()) / n_batches
        for stack, total in zip(stacks, totals, strict=True)
    }


def predict_logits(
    stacks: Sequence[TrialStack], source: TokenSource, rows: Rows, *, settings: TrainSettings
) -> list[Float[np.ndarray, "trial clip class"]]:
    """Logits of every stack for `rows`, in their order, from one read."""
    device, dtype, buffers = settings.torch_device, settings.torch_dtype, Buffers()
    parts: list[list[np.ndarray]] = [[] for _ in stacks]
    for batch in source.read(sequential(rows, batch_size=settings.batch_size)):
        tokens = convert(batch, dtype=dtype, device=device, buffers=buffers)
        for stack, part in zip(stacks, parts, strict=True):
            part.append(stack.logits(tokens).to("cpu", torch.float32).numpy())
    return [np.concatenate(part, axis=1) for part in parts]
