"""Nearest neighbours: a baseline that nothing is trained for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.base import (
    Dropout,
    Logits,
    Options,
    Probe,
    ProbeShape,
    Weights,
)
from patchbank.probing.probes.options import check_options, choice, number, whole
from patchbank.probing.probes.tokens import Tokens

BLOCK_CLIPS = 2**16
"""Remembered clips that a batch is compared with at once."""
SMALLEST_SHARE = 1e-6


@dataclass(frozen=True)
class KnnProbe(Probe):
    """Weighted cosine k-nearest neighbours on one vector a clip."""

    buffers: ClassVar[tuple[str, ...]] = ("vectors", "targets", "exclusive")
    mixes_layers: ClassVar[bool] = True
    learns: ClassVar[bool] = False

    k: int
    temperature: float
    vector: Literal["mean", "cls"]

    @property
    def uses_prefix(self) -> bool:
        return self.vector == "cls"

    @property
    def reads_means_only(self) -> bool:
        return self.vector == "mean"

    def first_weights(self, random: torch.Generator) -> Weights:
        """Nothing is remembered yet: no clip."""
        vectors = torch.zeros(0, self.shape.dim)
        targets = torch.zeros(0, self.shape.n_classes)
        return {"vectors": vectors, "targets": targets, "exclusive": torch.zeros(1)}

    def vectors(self, tokens: Tokens) -> Float[Tensor, "clip dim"]:
        """The vector of each clip, of length one; the mean over layers where there are several."""
        layers = [one.mean if self.vector == "mean" else one.cls for one in tokens.layers]
        return F.normalize(torch.stack(layers).mean(dim=0), dim=-1)

    def remember(
        self,
        vectors: Float[Tensor, "seen dim"],
        targets: Float[Tensor, "seen class"],
        *,
        multi_label: bool | None = None,
    ) -> Weights:
        """What `logits` needs of the training clips, with a trial axis of one.

        `multi_label` says whether probabilities are sigmoids of the logits or their softmax; by
        None, sigmoids where some clip has not exactly one label.
        """
        if multi_label is None:
            multi_label = not bool((targets.sum(dim=1) - 1).abs().max() < 1e-4)
        exclusive = torch.full((1, 1), float(not multi_label), dtype=vectors.dtype)
        return {"vectors": vectors[None], "targets": targets[None], "exclusive": exclusive}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        query = self.vectors(tokens)
        trials = zip(weights["vectors"], weights["targets"], weights["exclusive"], strict=True)
        return torch.stack([self._one(query, *trial) for trial in trials])

    def _one(
        self,
        query: Float[Tensor, "clip dim"],
        vectors: Float[Tensor, "seen dim"],
        targets: Float[Tensor, "seen class"],
        exclusive: Float[Tensor, " 1"],
    ) -> Float[Tensor, "clip class"]:
        similarity, index = self._nearest(query, vectors)
        share = (similarity / self.temperature).softmax(dim=1)
        voted = torch.einsum("ck,ckl->cl", share, targets[index])
        voted = voted.clamp(SMALLEST_SHARE, 1 - SMALLEST_SHARE)
        # The probability that comes of the logit is the share of votes, for either kind of task.
        return torch.where(exclusive > 0, voted.log(), voted.logit())

    def _nearest(
        self, query: Float[Tensor, "clip dim"], vectors: Float[Tensor, "seen dim"]
    ) -> tuple[Float[Tensor, "clip k"], Int[Tensor, "clip k"]]:
        """The k most similar clips, in bounded memory."""
        found = query.new_empty(query.shape[0], 0)
        places = found.long()
        for start in range(0, len(vectors), BLOCK_CLIPS):
            similarity = query @ vectors[start : start + BLOCK_CLIPS].T
            best = similarity.topk(min(self.k, similarity.shape[1]), dim=1)
            found = torch.cat([found, best.values], dim=1)
            places = torch.cat([places, best.indices + start], dim=1)
            found, order = found.topk(min(self.k, found.shape[1]), dim=1)
            places = places.gather(1, order)
        return found, places


def build_knn(shape: ProbeShape, options: Options) -> KnnProbe:
    """Cosine k-nearest neighbours on one vector a clip; nothing is trained.

    The k training clips with the highest cosine vote with weights softmax(cosine / temperature);
    logits = log of the share of votes (of its odds in multi-label tasks, where a clip votes for all
    its classes), shares kept within 1e-6 of 0 and 1. Options: k (20) and temperature (0.07), those
    of Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (arXiv
    2104.14294); vector, "mean" of the patches (default) or "cls". Of several layers it takes the
    mean vector. Seeds make no difference, and there is no learning rate to search for.
    """
    check_options("knn", options, ("k", "temperature", "vector"))
    vector = choice(options, "vector", ("mean", "cls"), "mean")
    if vector == "cls" and shape.n_prefix < 1:
        raise TrialError(
            "probe 'knn' with vector=cls needs a CLS token, found no prefix tokens in this layer "
            "of the bank; leave vector out to take the mean of the patches"
        )
    temperature = number(options, "temperature", 0.07, above=0)
    return KnnProbe(shape, whole(options, "k", 20), temperature, vector)
