"""A softmax mix of several layers in front of any probe for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.base import Dropout, Logits, Probe, Weights
from patchbank.probing.probes.mixing import MixedTokens, layers_to_mix
from patchbank.probing.probes.module import ModuleProbe
from patchbank.probing.probes.tokens import Tokens

LAYERS = "layers"
"""Name of the array of layer weights."""
ONE_AT_A_TIME = "trials one at a time: each mixes the layers its own way"


@dataclass(frozen=True)
class LayerMixProbe(Probe):
    """sum_l softmax(w)_l z_l in front of `inner`; w = 0 at first, so all layers weigh the same.

    Patches and prefix are mixed as they are, not normalised. Source: the linear variant of Ghaffari
    et al., "Convex Gated Probing" (arXiv 2602.16305). The mix differs from trial to trial, so
    trials go one at a time and memory holds the mixed tokens (and in training their gradient) of
    one.
    """

    mixes_layers: ClassVar[bool] = True

    inner: Probe

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The inner probe's."""
        return self.inner.buffers

    @property
    def learning_rates(self) -> tuple[float, float]:  # type: ignore[override]
        """The inner probe's."""
        return self.inner.learning_rates

    @property
    def options(self) -> dict[str, Any]:
        return self.inner.options

    @property
    def trials_at_once(self) -> int | None:
        return 1

    @property
    def uses_prefix(self) -> bool:
        return self.inner.uses_prefix

    @property
    def reads_means_only(self) -> bool:
        return self.inner.reads_means_only

    @property
    def note(self) -> str | None:
        """Behind a mix it makes no difference how a module's trials are stacked."""
        own = None if isinstance(self.inner, ModuleProbe) else self.inner.note
        return "; ".join(filter(None, [ONE_AT_A_TIME, own]))

    def first_weights(self, random: torch.Generator) -> Weights:
        inner = self.inner.first_weights(random)
        if LAYERS in inner:
            raise TrialError(
                f"found an array {LAYERS!r} in the probe, expected another name: a mix keeps its "
                "own weights under that; rename it in the probe's file, or pass --layer last"
            )
        return {**inner, LAYERS: torch.zeros(self.shape.n_layers)}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        layers = layers_to_mix(tokens, self.shape.n_layers, uses_prefix=self.uses_prefix)
        logits = []
        for trial, shares in enumerate(self.shares(weights)):
            own = slice(trial, trial + 1)
            inner = {key: value[own] for key, value in weights.items() if key != LAYERS}
            mixed = MixedTokens(layers, shares)
            own_dropout = None if dropout is None else dropout[own]
            logits.append(self.inner.logits(inner, mixed, dropout=own_dropout))
        return torch.cat(logits)

    def penalty(self, weights: Weights) -> Float[Tensor, " trial"] | None:
        """The inner probe's."""
        return self.inner.penalty({key: weights[key] for key in weights if key != LAYERS})

    def shares(self, weights: Weights) -> Float[Tensor, "trial layer"]:
        """How much of each layer each trial takes; sums to one."""
        return weights[LAYERS].softmax(dim=-1)
