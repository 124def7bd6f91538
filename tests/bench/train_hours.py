"""Hours of the paper's whole study on this device, from step times measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from train_steps import StepBench, paper_probes, wait_for

from patchbank.pipeline.errors import TrialError

BATCH_SIZE, N_EPOCHS = 128, 30
N_SEARCH, N_SEEDS = 50, 5
N_RUNS = N_SEARCH + N_SEEDS
N_PAIRS = 63
"""Pairs of encoder and probe: 14 sets x 55 runs x 63 are the paper's 48,510 runs."""
N_STACKED = 3
"""Trials of the second measured stack: what one more trial costs comes from 1 and this many."""
SETS: Mapping[str, tuple[int, int]] = {
    # Classes, and clips of the training split. BirdSet: 64 shots a class.
    "as20k": (527, 18_600),
    "fsd50k": (200, 40_966),
    "desed": (10, 20_000),
    "spass": (28, 17_500),
    "urban": (10, 6_000),
    "hsn": (21, 64 * 21),
    "pow": (48, 64 * 48),
    "per": (132, 64 * 132),
    "nes": (89, 64 * 89),
    "sne": (56, 64 * 56),
    "uhh": (26, 64 * 26),
    "nbp": (51, 64 * 51),
    "esc50": (50, 1_600),
    "sc2": (35, 84_800),
}


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step of one family by (classes, trials)."""

    seconds: Mapping[tuple[int, int], float]

    def step_s(self, n_classes: int, n_trials: int) -> float:
        """On a line through the two measured class counts, and through the two stacks."""
        one, more = self._at(n_classes, 1), self._at(n_classes, N_STACKED)
        each = max(0.0, (more - one) / (N_STACKED - 1))
        return one + (n_trials - 1) * each

    def _at(self, n_classes: int, n_trials: int) -> float:
        found = {classes: s for (classes, trials), s in self.seconds.items() if trials == n_trials}
        (low, at_low), (high, at_high) = min(found.items()), max(found.items())
        if low == high:
            return at_low
        slope = max(0.0, (at_high - at_low) / (high - low))
        return max(at_low + slope * (n_classes - low), min(at_low, at_high))


def measure_steps(
    bench: StepBench, class_counts: Sequence[int], *, most_s: float
) -> tuple[dict[str, StepTimes], list[str]]:
    """One step each after one that is not counted, and what was left out after `most_s`."""
    found, notes, start = {}, [], time.perf_counter()
    for name in paper_probes():
        seconds = {}
        for n_classes in class_counts:
            for n_trials in (1, N_STACKED):
                if time.perf_counter() - start > most_s:
                    break
                try:
                    stack = bench.family_stack(name, n_classes, n_trials)
                    targets = bench.targets(n_classes)
                    # The first step of a family on a CPU pays for its memory, on a GPU for tuning.
                    if n_trials == 1 or bench.device.type == "cuda":
                        bench.timed(stack, targets)
                    seconds[n_classes, n_trials] = bench.timed(stack, targets)
                except TrialError as error:
                    notes.append(f"hours: {name} is left out: {error}")
                finally:
                    wait_for(bench.device)
        if len(seconds) == 2 * len(class_counts):
            found[name] = StepTimes(seconds)
        elif not any(note.startswith(f"hours: {name} ") for note in notes):
            notes.append(f"hours: {name} is left out: {most_s:.0f} s were over")
    return found, notes


def n_steps(n_clips: int) -> int:
    """Steps of one run."""
    return N_EPOCHS * -(-n_clips // BATCH_SIZE)


def hours(times: Mapping[str, StepTimes], read_s: float, *, is_stacked: bool) -> float:
    """Of all sets, over the families that were measured, scaled to the paper's 63 pairs.

    A step lasts as long as the slower of computing it and reading its batch, which `read_s` is:
    the loader reads ahead. One run one read: 55 runs, each with a read of its own for every step.
    Stacked: the 50 trials of all families of an encoder share a read, and the 5 seeds another.
    """
    n_encoders = N_PAIRS / len(times)
    total = 0.0
    for n_classes, n_clips in SETS.values():
        if is_stacked:
            one_encoder = sum(
                max(read_s, sum(time.step_s(n_classes, n_trials) for time in times.values()))
                for n_trials in (N_SEARCH, N_SEEDS)
            )
        else:
            one_encoder = N_RUNS * sum(
                max(read_s, time.step_s(n_classes, 1)) for time in times.values()
            )
        total += n_encoders * n_steps(n_clips) * one_encoder
    return total / 3_600


def projection(times: Mapping[str, StepTimes], read_clips_per_s: float | None) -> dict[str, float]:
    """Hours both ways, where something was measured."""
    if not times:
        return {}
    read_s = BATCH_SIZE / read_clips_per_s if read_clips_per_s else 0.0
    return {
        "one run one read": hours(times, read_s, is_stacked=False),
        "stacked in one pass": hours(times, read_s, is_stacked=True),
    }


def lines(
    times: Mapping[str, StepTimes], read_clips_per_s: float | None, found: Mapping[str, float]
) -> Iterator[str]:
    """The measured steps, the arithmetic and the hours."""
    if not times:
        return
    yield f"| step of {BATCH_SIZE} clips, s (one round) | classes | 1 trial | {N_STACKED} trials |"
    yield "|---|---|---|---|"
    for name, time_ in times.items():
        for n_classes in sorted({classes for classes, _ in time_.seconds}):
            one, more = (time_.seconds[n_classes, count] for count in (1, N_STACKED))
            yield f"| {name} | {n_classes} | {one:.3g} | {more:.3g} |"
    steps = sum(n_steps(n_clips) for _, n_clips in SETS.values())
    read = (
        f"reading {read_clips_per_s:,.0f} clips/s, as measured cold"
        if read_clips_per_s
        else "reading left out: it was not measured"
    )
    yield ""
    yield (
        f"The paper's study: {len(SETS)} sets x {N_RUNS} runs ({N_SEARCH} + {N_SEEDS} seeds) x "
        f"{N_PAIRS} pairs of encoder and probe = {len(SETS) * N_RUNS * N_PAIRS:,} runs, "
        f"{N_EPOCHS} epochs in batches of {BATCH_SIZE}: {steps:,} steps of one run over all sets."
    )
    yield (
        f"A step of S trials = t(1) + (S - 1) (t({N_STACKED}) - t(1)) / {N_STACKED - 1}, on a line "
        f"over classes; mean over the {len(times)} families above; {read}; the slower of the two "
        "counts. All clips as 512 x 768, although those of 1 s and 5 s are shorter; validation, "
        "test and early stopping are left out."
    )
    for way, value in found.items():
        yield f"projected hours on this device, {way}: {value:,.0f}"
