"""The protocol behind every reported number.

(a) Search: all learning rates of all probe families at seed 0, trained in one pass an epoch; the
best on validation data is chosen. (b) Final: the chosen rate with several seeds, again in one
pass. The test split is read once, after everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from patchbank.pipeline.errors import TrialError
from patchbank.probing.batch import TokenSource
from patchbank.probing.metrics import left_out, primary_metric, score
from patchbank.probing.passes import OnProgress, choose_loss, fit_stacks, predict_logits
from patchbank.probing.plan import Rows
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import Probe, ProbeShape, Weights
from patchbank.probing.settings import TrainSettings
from patchbank.probing.splits import Split
from patchbank.probing.trials import Trial, TrialStack

Scores = Float[np.ndarray, "seed clip class"]


@dataclass(frozen=True)
class Candidate:
    """One learning rate of the search."""

    learning_rate: float
    score: float | None
    """Primary metric on validation data: -inf if it diverged, None if there was no choice."""


@dataclass(frozen=True)
class Outcome:
    """One probe family, trained and applied to one split."""

    name: str
    probe: Probe
    candidates: tuple[Candidate, ...]
    trials: tuple[Trial, ...]
    """The final ones, one a seed."""
    weights: tuple[Weights, ...]
    """One a seed, on the CPU."""
    valid_scores: Float[np.ndarray, "seed valid class"]
    """Logits of multi-label tasks, log-probabilities of multi-class ones."""
    test_scores: Float[np.ndarray, "seed test class"]
    valid_values: tuple[float, ...]
    """Primary metric on validation data, one a seed."""

    @property
    def best_seed(self) -> int:
        """Position of the seed that validation data prefer."""
        return int(np.argmax(self.valid_values))


@dataclass(frozen=True)
class _Job:
    """What every step of the protocol needs."""

    source: TokenSource
    targets: Float[np.ndarray, "clip class"]
    split: Split
    multi_label: bool
    settings: TrainSettings
    progress: OnProgress | None


def train(
    source: TokenSource,
    targets: Float[np.ndarray, "clip class"],
    split: Split,
    *,
    probes: Sequence[str],
    multi_label: bool,
    settings: TrainSettings | None = None,
    progress: OnProgress | None = None,
) -> tuple[Outcome, ...]:
    """Searches, trains and applies `probes`, in their order; raises `TrialError`.

    Selection sees validation rows only. The result is decided by its arguments, device and
    number of threads; which other probes are trained beside one changes only rounding.
    """
    settings = settings or TrainSettings()
    targets = np.ascontiguousarray(targets, dtype=np.float32)
    job = _Job(source, targets, split, multi_label, settings, progress)
    _check(job)
    families = _families(job, probes)
    return _final(job, families, _search(job, families))


def _check(job: _Job) -> None:
    metric = primary_metric(multi_label=job.multi_label)
    for name, rows in (("valid", job.split.valid), ("test", job.split.test)):
        if len(left_out(metric, job.targets[rows])) == job.targets.shape[1]:
            raise TrialError(
                f"found no label on any of the {len(rows)} {name} clips of {job.split.name}, "
                f"expected positives to compute {metric}; pass another --splits or --labels"
            )


def _families(job: _Job, names: Sequence[str]) -> dict[str, Probe]:
    if not names:
        raise TrialError("found no probe to train, expected at least one; pass --probe protobin")
    unused = sorted({*job.settings.options, *job.settings.learning_rates} - set(names))
    if unused:
        raise TrialError(
            f"found settings for {', '.join(unused)}, expected only probes that are trained: "
            f"{', '.join(names)}"
        )
    shape = ProbeShape(job.source.dim, job.targets.shape[1], job.source.n_prefix)
    return {name: build_probe(name, shape, job.settings.options.get(name)) for name in names}


def _stack(
    job: _Job, name: str, probe: Probe, *, rates: Sequence[float], seeds: Sequence[int]
) -> TrialStack:
    """One trial for each pair of learning rate and seed."""
    settings = job.settings
    trials = [
        Trial(rate, settings.weight_decay, seed) for rate, seed in zip(rates, seeds, strict=True)
    ]
    return TrialStack(name, probe, trials, dtype=settings.torch_dtype, device=settings.torch_device)


def _fit(job: _Job, stacks: Sequence[TrialStack], stage: str) -> None:
    prefix = "" if job.split.name == "split" else f"{job.split.name} "
    fit_stacks(
        stacks,
        job.source,
        job.targets,
        job.split.train,
        loss=choose_loss(job.settings, multi_label=job.multi_label),
        settings=job.settings,
        stage=prefix + stage,
        progress=job.progress,
    )


def _search(job: _Job, families: dict[str, Probe]) -> dict[str, tuple[Candidate, ...]]:
    """Validation scores of every learning rate, from one run of all families that have several."""
    candidates: dict[str, tuple[Candidate, ...]] = {}
    stacks = []
    for name, probe in families.items():
        rates = job.settings.candidates(name, probe.learning_rates)
        candidates[name] = tuple(Candidate(rate, None) for rate in rates)
        if len(rates) > 1:
            stacks.append(_stack(job, name, probe, rates=rates, seeds=[0] * len(rates)))
    if not stacks:
        return candidates
    _fit(job, stacks, "search")
    values = _validate(job, stacks)[1]
    for stack, judged in zip(stacks, values, strict=True):
        candidates[stack.name] = tuple(
            Candidate(trial.learning_rate, value)
            for trial, value in zip(stack.trials, judged, strict=True)
        )
    return candidates


def _validate(
    job: _Job, stacks: Sequence[TrialStack]
) -> tuple[list[Scores], list[tuple[float, ...]]]:
    """Validation scores of every stack, and each trial's primary metric (-inf if it diverged)."""
    scores = _scores(job, stacks, job.split.valid)
    metric = primary_metric(multi_label=job.multi_label)
    truth = job.targets[job.split.valid]
    values = [
        tuple(
            score(metric, truth, one) if finite and np.isfinite(one).all() else -math.inf
            for one, finite in zip(scored, stack.is_finite.tolist(), strict=True)
        )
        for stack, scored in zip(stacks, scores, strict=True)
    ]
    return scores, values


def _scores(job: _Job, stacks: Sequence[TrialStack], rows: Rows) -> list[Scores]:
    logits = predict_logits(stacks, job.source, rows, settings=job.settings)
    if job.multi_label:
        return logits
    # Logits of different clips have no common zero; log-probabilities do, and never tie like
    # probabilities that round to one.
    return [torch.log_softmax(torch.from_numpy(one), dim=-1).numpy() for one in logits]


def choose(name: str, candidates: Sequence[Candidate]) -> float:
    """The learning rate with the best validation score, the lowest of equals."""
    if len(candidates) == 1:
        return candidates[0].learning_rate
    best = max(candidates, key=lambda candidate: candidate.score or 0.0)
    if best.score == -math.inf:
        tried = ", ".join(f"{candidate.learning_rate:g}" for candidate in candidates)
        raise TrialError(
            f"every learning rate of probe {name!r} diverged (tried {tried}), expected one to "
            "train; pass lower learning rates, or look for bad tokens: patchbank bank verify"
        )
    return best.learning_rate


def _final(
    job: _Job, families: dict[str, Probe], candidates: dict[str, tuple[Candidate, ...]]
) -> tuple[Outcome, ...]:
    seeds = list(range(job.settings.n_seeds))
    stacks = []
    for name, probe in families.items():
        rate = choose(name, candidates[name])
        stacks.append(_stack(job, name, probe, rates=[rate] * len(seeds), seeds=seeds))
    _fit(job, stacks, "final")
    valid, values = _validate(job, stacks)
    for stack, judged in zip(stacks, values, strict=True):
        _check_converged(stack, judged)
    test = _scores(job, stacks, job.split.test)
    return tuple(
        Outcome(
            stack.name,
            stack.probe,
            candidates[stack.name],
            stack.trials,
            tuple(stack.weights_of(index) for index in range(len(seeds))),
            valid_scores,
            test_scores,
            judged,
        )
        for stack, valid_scores, test_scores, judged in zip(
            stacks, valid, test, values, strict=True
        )
    )


def _check_converged(stack: TrialStack, values: Sequence[float]) -> None:
    diverged = [
        trial for trial, value in zip(stack.trials, values, strict=True) if value == -math.inf
    ]
    if diverged:
        seeds = ", ".join(str(trial.seed) for trial in diverged)
        raise TrialError(
            f"probe {stack.name!r} diverged at learning rate {diverged[0].learning_rate:g} with "
            f"seed {seeds}, expected finite losses; pass lower learning rates"
        )
