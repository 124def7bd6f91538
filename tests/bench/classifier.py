"""`ProbeClassifier` on a view of a bank beside the same tokens as an array in memory.

    python tests/bench/classifier.py [--clips 512] [--rounds 3] [--tier auto]

Both are in the page cache; each round times every case once, in turn, and the ratio is that of the
quickest rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from synthetic_bank import make_bank

from patchbank.probing import ProbeClassifier

PROBES = ("linear", "mhca", "protobin")
N_CLASSES = 10
N_EPOCHS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        bank = make_bank(Path(folder) / "x.bank", n_clips=options.clips, dtype=options.dtype)
        view = bank.rows_view()
        tokens = np.asarray(view)
        y = np.random.default_rng(0).integers(N_CLASSES, size=len(view))
        print(f"{view!r}, {N_EPOCHS} epochs of batches of 64, tier {options.tier}")
        for probe in PROBES:
            classifier = ProbeClassifier(
                probe,
                n_epochs=N_EPOCHS,
                learning_rate=1e-3,
                random_state=0,
                tier=options.tier,
                device=options.device,
            )
            compare(classifier, {"array": tokens, "view": view}, y, options.rounds)


def compare(
    classifier: ProbeClassifier, forms: dict[str, object], y: np.ndarray, n_rounds: int
) -> None:
    """Prints the quickest times of training and predicting in each form, and their ratio."""
    for what, call in (("fit", classifier.fit), ("predict", lambda x, y: classifier.predict(x))):
        times = {name: [timed(call, x, y)] for name, x in forms.items()}
        for _ in range(n_rounds - 1):
            for name, x in forms.items():
                times[name].append(timed(call, x, y))
        best = {name: min(found) for name, found in times.items()}
        said = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in best.items())
        print(f"{classifier.probe:9} {what:8} {said}: {best['view'] / best['array']:.2f}")


def timed(call: Callable[[object, np.ndarray], object], x: object, y: np.ndarray) -> float:
    start = time.perf_counter()
    call(x, y)
    return time.perf_counter() - start


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tier", default="auto")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", default=None, help="where the bank is made")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
