"""The benchmark of banks at work on a few small clips: it runs, checks, and cleans up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parent / "bench"
SMALL = ["--clips", "64", "--rounds", "1", "--shape", "32", "128", "--no-pretouch"]


def run_bench(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What the benchmark wrote as JSON and as a table."""
    out = folder / "out.json"
    command = [sys.executable, BENCH / "bank.py", *SMALL, "--folder", folder / "stores"]
    done = subprocess.run(
        [*map(str, command), "--json", str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "choose another --folder" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert not list((folder / "stores").iterdir())
    return json.loads(out.read_text()), done.stdout


def test_the_bank_is_measured_against_limits_and_zarr(tmp_path: Path) -> None:
    found, table = run_bench(tmp_path, "--skip", "h5py", "webdataset", "litdata", "datasets")
    rates = [s["clips_per_s"] for m in found["measures"].values() for s in m["samples"]]
    assert min(rates) > 0
    rows = {(row["section"], row["name"].split(" (")[0]): row for row in found["table"]}
    for place in (
        ("cold", "patchbank auto"),
        ("cold", "int8 auto, codes"),
        ("peers", "zarr-python a clip"),
        ("warm", "patchbank auto"),
        ("write", "zarr-python, whole shards"),
    ):
        assert rows[place]["ratio"] > 0
    assert found["machine"]["cores"] >= 1
    assert "ring_bytes" in table
    assert max(map(len, table.splitlines())) <= 100


@pytest.mark.slow
def test_every_peer_reads_what_it_was_asked_for(tmp_path: Path) -> None:
    found, _ = run_bench(tmp_path, "--only", "peers")
    packages = {"h5py", "webdataset", "litdata", "datasets", "zarrs"}
    skipped = {line.split()[1] for line in found["skipped"]}
    if skipped == packages:
        pytest.skip("no peer is installed: pip install -e '.[bench]'")
    assert len(found["measures"]) >= 3 + len(packages - skipped)


def test_a_reader_of_other_clips_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from clips import SyntheticClips
    from reading import Opened, Order, Reader, WrongData, draw_order, read_warm

    clips, order = SyntheticClips(128, 4, 8), draw_order(128, 64, seed=0)
    whole = torch.from_numpy(clips.rows(range(128)))

    def reader(rows: np.ndarray, *, keeps_order: bool = True) -> Reader:
        def one_batch(_: Order) -> Opened:
            return Opened([whole[torch.from_numpy(rows)]])

        return Reader("r", tmp_path, one_batch, lambda: clips.marks, keeps_order=keeps_order)

    asked = order.batches[0]
    read_warm(reader(asked), order, clips, 1.0)
    read_warm(reader(np.arange(64), keeps_order=False), order, clips, 1.0)
    for wrong in (
        reader(np.roll(asked, 1)),
        reader(np.arange(63), keeps_order=False),
        reader(np.zeros(64, np.int64), keeps_order=False),
    ):
        with pytest.raises(WrongData):
            read_warm(wrong, order, clips, 1.0)
