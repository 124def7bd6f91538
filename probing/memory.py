"""Probes without parameters: what they need is the training clips themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchbank.probing.losses import Loss
from patchbank.probing.probes.base import Weights
from patchbank.probing.probes.knn import KnnProbe
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.trials import Trial


class MemoryStack:
    """`TrialStack` of a probe that remembers: its trials are one and the same.

    Vectors and targets of the training clips, 4 x (dim + class) bytes a clip.
    """

    def __init__(
        self,
        name: str,
        probe: KnnProbe,
        trials: Sequence[Trial],
        *,
        multi_label: bool | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.probe, self.trials = name, probe, tuple(trials)
        self._multi_label = multi_label
        self._dtype, self._device = dtype, torch.empty(0, device=device).device
        self.parts = [slice(0, len(self.trials))]
        self.kept: tuple[int, ...] = tuple(range(len(self.trials)))
        self._vectors: list[Tensor] = []
        self._targets: list[Tensor] = []
        self.is_finite: Bool[Tensor, " trial"] = torch.ones(
            len(trials), dtype=torch.bool, device=device
        )

    @torch.no_grad()
    def step(
        self, tokens: Tokens, targets: Float[Tensor, "clip class"], loss: Loss, *, factor: float
    ) -> Float[Tensor, " trial"]:
        """Remembers a batch; there is no loss."""
        self._vectors.append(self.probe.vectors(tokens).to(self._dtype))
        self._targets.append(targets.to(self._dtype))
        return torch.zeros(len(self.trials), device=self._device)

    @property
    def state(self) -> dict[str, Tensor]:
        """What `restore` takes to go on from here."""
        self._join()
        if not self._vectors:
            return {}
        return {"vectors": self._vectors[0], "targets": self._targets[0]}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Remembers what the stack of a `state` did."""
        if state:
            self._vectors = [state["vectors"].to(self._device)]
            self._targets = [state["targets"].to(self._device)]

    def _join(self) -> None:
        if len(self._vectors) > 1:
            self._vectors = [torch.cat(self._vectors)]
            self._targets = [torch.cat(self._targets)]

    @property
    def weights(self) -> Weights:
        """With a trial axis of one."""
        self._join()
        [vectors], [targets] = self._vectors, self._targets
        return self.probe.remember(vectors, targets, multi_label=self._multi_label)

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Float[Tensor, "trial clip class"]:
        found = self.probe.logits(self.weights, tokens)
        return found.expand(len(self.trials), -1, -1)

    def weights_of(self, index: int) -> Weights:
        """What is remembered, on the CPU, without the trial axis."""
        return {key: value[0].cpu().contiguous() for key, value in self.weights.items()}
