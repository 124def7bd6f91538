"""AdamW over stacked trials, each with its own learning rate and weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class StackedAdamW:
    """AdamW whose every update stays within a trial's slice; equal to torch.optim.AdamW (tested).

    Like torch.optim.AdamW by default it decays all parameters, biases and queries included.
    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, alg. 2.
    """

    def __init__(
        self,
        parameters: Sequence[Float[Tensor, "trial ..."]],
        *,
        learning_rates: Float[Tensor, " trial"],
        weight_decays: Float[Tensor, " trial"],
    ) -> None:
        self._parameters = list(parameters)
        self._learning_rates, self._weight_decays = learning_rates, weight_decays
        self._means = [torch.zeros_like(parameter) for parameter in parameters]
        self._squares = [torch.zeros_like(parameter) for parameter in parameters]
        self._n_steps = 0

    def keep(self, trials: Sequence[int], parameters: Sequence[Float[Tensor, "trial ..."]]) -> None:
        """Forgets all trials but these, of which `parameters` are what is left."""
        self._parameters = list(parameters)
        index = torch.tensor(trials, device=self._learning_rates.device)
        self._learning_rates = self._learning_rates[index]
        self._weight_decays = self._weight_decays[index]
        self._means = [one[index] for one in self._means]
        self._squares = [one[index] for one in self._squares]

    @property
    def state(self) -> dict[str, Tensor]:
        """What `restore` takes to go on from here: moments and the number of steps."""
        moments = {"mean": self._means, "square": self._squares}
        found = {f"{kind}/{i}": one for kind, all_ in moments.items() for i, one in enumerate(all_)}
        return {"n_steps": torch.tensor(self._n_steps), **found}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state` of the same trials."""
        self._n_steps = int(state["n_steps"])
        for kind, moments in (("mean", self._means), ("square", self._squares)):
            for index, one in enumerate(moments):
                one.copy_(state[f"{kind}/{index}"])

    def step(
        self, gradients: Sequence[Float[Tensor, "trial ..."] | None], *, factor: float = 1.0
    ) -> None:
        """One update of all trials with `factor` times the learning rates.

        A parameter without a gradient stays as it is.
        """
        self.begin_step()
        self.update(slice(None), gradients, factor=factor)

    def begin_step(self) -> None:
        """Counts a step; each trial is then to be updated once."""
        self._n_steps += 1

    @torch.no_grad()
    def update(
        self,
        trials: slice,
        gradients: Sequence[Float[Tensor, "trial ..."] | None],
        *,
        factor: float = 1.0,
    ) -> None:
        """The update of some trials, from their gradients alone."""
        rates = self._learning_rates[trials] * factor
        decays = self._weight_decays[trials]
        # All memory that it takes is taken first: where that does not suffice, nothing has changed.
        sizes = [gradient.numel() for gradient in gradients if gradient is not None]
        scratch = self._parameters[0].new_empty(max(sizes, default=0))
        for parameter, gradient, mean, square in zip(
            self._parameters, gradients, self._means, self._squares, strict=True
        ):
            if gradient is not None:
                self._update(
                    parameter[trials],
                    gradient,
                    mean[trials],
                    square[trials],
                    rates,
                    decays,
                    scratch[: gradient.numel()].view(gradient.shape),
                )

    def _update(
        self,
        parameter: Float[Tensor, "trial ..."],
        gradient: Float[Tensor, "trial ..."],
        mean: Float[Tensor, "trial ..."],
        square: Float[Tensor, "trial ..."],
        rates: Float[Tensor, " trial"],
        decays: Float[Tensor, " trial"],
        scratch: Float[Tensor, "trial ..."],
    ) -> None:
        shape = (-1, *[1] * (parameter.ndim - 1))
        parameter.mul_((1 - rates * decays).view(shape))
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        unbiased = torch.sqrt(square, out=scratch)
        unbiased.div_(math.sqrt(1 - BETAS[1] ** self._n_steps)).add_(EPSILON)
        step = (rates / (1 - BETAS[0] ** self._n_steps)).view(shape)
        parameter.sub_(unbiased.reciprocal_().mul_(mean).mul_(step))


def cosine_factor(
    step: int, *, n_steps: int, n_warmup_steps: int = 0, lowest: float = 0.0
) -> float:
    """Share of the learning rate at 0-based `step`: linear warm-up, then half a cosine.

    It ends at `lowest`, zero by default.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, eq. 5, without restarts.
    """
    if step < n_warmup_steps:
        return (step + 1) / n_warmup_steps
    progress = (step - n_warmup_steps) / max(1, n_steps - n_warmup_steps)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
