"""The published encoders at their published sizes: parameters, time to load, time of a clip.

    python tests/bench/encoders.py --keys FOLDER [--rounds 5] [--only WORD...] [--json FILE]

FOLDER holds the lists of published keys (beats/fullsize_keys.json ...). Weights are random; a file
in the publisher's layout is written, loaded strictly, and one clip is encoded, float32, alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from full_size import FULL_SIZE
from machine import describe, machine_facts

from patchbank.pipeline import load_encoder


def seconds_of(call: Callable[[], Any], rounds: int) -> float:
    """The median over some calls, after one more."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(model: str, keys: Path, rounds: int) -> dict[str, Any]:
    name, clip_s, write = FULL_SIZE[model]
    with tempfile.TemporaryDirectory() as folder:
        path = write(keys, Path(folder))
        start = time.perf_counter()
        encoder: Any = load_encoder(name, weights=path)
        load_s = time.perf_counter() - start
    n_samples = round(clip_s * encoder.spec.sample_rate_hz)
    generator = torch.Generator().manual_seed(0)
    waveform = 0.1 * torch.randn(1, n_samples, generator=generator)
    features = encoder.frontend(waveform)
    last = encoder.spec.layers[-1].layer
    tokens = encoder.encode(features, [last])[last]
    assert torch.isfinite(tokens.patches).all()
    return {
        "model": model,
        "encoder": encoder.spec.name,
        "clip_s": clip_s,
        "grid": [tokens.grid.time, tokens.grid.freq],
        "dim": tokens.patches.shape[2],
        "n_prefix": 0 if tokens.prefix is None else tokens.prefix.shape[1],
        "n_layers": len(encoder.spec.layers),
        "n_parameters": sum(p.numel() for p in encoder.network.parameters()),
        "load_s": load_s,
        "frontend_ms": 1_000 * seconds_of(lambda: encoder.frontend(waveform), rounds),
        "encode_ms": 1_000 * seconds_of(lambda: encoder.encode(features, [last]), rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = [m for m in FULL_SIZE if not options.only or any(w in m for w in options.only)]
    print(describe(machine_facts(Path(tempfile.gettempdir()))))
    print("| model | layers x dim | prefix | grid | parameters | load | front end | encoder |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for model in chosen:
        row = measure(model, options.keys, options.rounds)
        rows.append(row)
        print(
            f"| {model} | {row['n_layers']} x {row['dim']} | {row['n_prefix']} | "
            f"{row['grid'][0]} x {row['grid'][1]} of {row['clip_s']:g} s | "
            f"{row['n_parameters'] / 1e6:.1f} M | {row['load_s']:.1f} s | "
            f"{row['frontend_ms']:.0f} ms | {row['encode_ms']:.0f} ms |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
