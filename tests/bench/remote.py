"""A pass over a bank at an address against one over the bank itself: cold cache, warm cache.

    python tests/bench/remote.py FOLDER [--clips 500] [--url s3://team/x.bank]

FOLDER gets the bank and the cache, and is emptied at the end; a bank at --url has to be a copy of
that bank. Prints clips a second, median of some rounds in turn, and ratios to the local pass.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path

from synthetic_bank import make_bank

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.probing import BatchLoader

ROUNDS = 3


def pass_s(bank: Bank) -> float:
    """Seconds of one shuffled pass over all clips, from the first batch's request to the last."""
    loader = BatchLoader(bank, tier="read")
    start = time.perf_counter()
    n_clips = sum(len(batch.rows) for batch in loader)
    assert n_clips == bank.n_clips
    return time.perf_counter() - start


def measure(folder: Path, n_clips: int, url: str | None) -> dict[str, float]:
    os.environ["PATCHBANK_CACHE"] = str(folder / "cache")
    here = make_bank(folder / "x.bank", n_clips=n_clips)
    url = url or f"file://{here.path.absolute()}"
    seconds: dict[str, list[float]] = {"local": [], "cold": [], "warm": []}
    pass_s(here)
    for _ in range(ROUNDS):
        seconds["local"].append(pass_s(here))
        shutil.rmtree(folder / "cache", ignore_errors=True)
        seconds["cold"].append(pass_s(open_bank(url)))
        seconds["warm"].append(pass_s(open_bank(url)))
    found = {f"{name}_clips_per_s": n_clips / statistics.median(s) for name, s in seconds.items()}
    for name in ("cold", "warm"):
        found[f"{name}_to_local"] = found[f"{name}_clips_per_s"] / found["local_clips_per_s"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--url")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True)
    try:
        print(json.dumps(measure(asked.folder, asked.clips, asked.url), indent=1))
    finally:
        shutil.rmtree(asked.folder)


if __name__ == "__main__":
    main()
