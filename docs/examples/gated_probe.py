"""Attention per class as a plain torch module: `patchbank check gated_probe.py`.

Each class weighs the patches itself and averages its own logits: the decision-level attention of
Kong et al., "Weakly Labelled AudioSet Tagging with Attention Neural Networks" (arXiv 1903.00765).
"""

from __future__ import annotations

from torch import Tensor, nn

from patchbank.probing.probes.plugin import Options, ProbeShape, Tokens, check_options, number


class GatedProbe(nn.Module):
    learning_rates = (1e-4, 1e-2)

    def __init__(self, dim: int, n_classes: int, dropout: float) -> None:
        super().__init__()
        self.options = {"dropout": dropout}
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.attention = nn.Linear(dim, n_classes)
        self.classes = nn.Linear(dim, n_classes)

    def forward(self, tokens: Tokens) -> Tensor:
        """(clip, patch, dim) to logits (clip, class)."""
        patches = self.dropout(self.norm(tokens.patches))
        scores = self.attention(patches)
        if tokens.counts is not None:
            scores = scores.masked_fill(~tokens.counts[..., None], float("-inf"))
        return (scores.softmax(dim=1) * self.classes(patches)).sum(dim=1)


def build(shape: ProbeShape, options: Options) -> nn.Module:
    """Each class weighs the patches and averages its own logits.

    logits_c = sum_n softmax_n(u_c . x_n) (w_c . x_n + b_c), x = dropout(norm(z)). Option dropout:
    default 0.2.
    """
    check_options("gated_probe", options, ("dropout",))
    dropout = number(options, "dropout", 0.2, at_least=0, below=1)
    return GatedProbe(shape.dim, shape.n_classes, dropout)
