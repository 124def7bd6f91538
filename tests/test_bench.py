"""The benchmarks at work on a few small clips: they run and clean up."""

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
def test_training_is_measured_against_plain_autograd_and_the_loader(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        BENCH / "train.py",
        "--rounds",
        "2",
        "--clips",
        "64",
        "--no-pretouch",
    ]
    tiny = ["--shape", "32", "128", "--step-classes", "3"]
    hours = ["--step-classes", "3", "--hours-clips", "2", "--hours-classes", "2", "4"]
    done = subprocess.run(
        [*map(str, command), *tiny, *hours, "--folder", tmp_path / "work", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "choose another --folder" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    ratios = found["ratios"]
    assert {"linpre", "mhca"} <= {word for name in ratios for word in name.split()}
    assert len(ratios) >= 5
    assert all(ratio["n_rounds"] == 2 and ratio["median"] > 0 for ratio in ratios.values())
    assert found["step"]["loss difference"] < 1e-5
    assert found["step"]["weight difference"] < 1e-4
    seen_bytes = 64 * 32 * 128 * 2
    for passes in found["bytes"].values():
        assert all(seen_bytes <= one["asked"] < 1.5 * seen_bytes for one in passes)
    assert set(found["hours"]) == {"stacked in one pass", "one run one read"}
    assert all(hours > 0 for hours in found["hours"].values())
    assert set(found["steps"]) >= {"linear", "linpre", "mhca", "protobin"}
    if not torch.cuda.is_available():
        assert "no GPU: missing" in done.stdout
    assert not list((tmp_path / "work").iterdir())


def test_a_study_in_hours_is_the_arithmetic_it_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import train_hours
    from train_hours import StepTimes, n_steps, projection

    assert len(train_hours.SETS) * train_hours.N_RUNS * train_hours.N_PAIRS == 48_510
    assert n_steps(129) == 60
    # 1 s for ten classes and 0.1 s a class more; another trial costs half a second.
    slow = StepTimes({(10, 1): 1.0, (10, 3): 2.0, (20, 1): 2.0, (20, 3): 3.0})
    assert slow.step_s(10, 1) == 1.0
    assert slow.step_s(30, 5) == pytest.approx(3.0 + 4 * 0.5)
    monkeypatch.setattr(train_hours, "SETS", {"one": (10, 128), "two": (20, 256)})
    found = projection({"slow": slow}, None)
    runs = 63 * 55 * (30 * 1.0 + 60 * 2.0) / 3_600
    assert found["one run one read"] == pytest.approx(runs)
    stacked = 30 * (25.5 + 3.0) + 60 * (26.5 + 4.0)
    assert found["stacked in one pass"] == pytest.approx(63 * stacked / 3_600)
    # Where reading is slower than computing, a run lasts as long as its reads.
    read = projection({"slow": slow}, 128 / 100.0)
    assert read["one run one read"] == pytest.approx(63 * 55 * 90 * 100.0 / 3_600)
    assert read["stacked in one pass"] == pytest.approx(63 * 2 * 90 * 100.0 / 3_600)


def test_ratios_of_training_are_paired_and_held_against_both_kinds_of_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from train_report import Figures, Target, ratio_table

    figures = Figures()
    for number, (together, apart) in enumerate([(1.0, 10.0), (8.0, 16.0), (2.0, 10.0)]):
        figures.add("s: together", number, together)
        figures.add("s: apart", number, apart)
    figures.add("s: apart", 3, 1.0)
    low = Target("s", "low", "together", "apart", limit=0.15, is_most=True)
    high = Target("s", "high", "apart", "together", limit=1.6)
    unknown = Target("s", "unknown", "apart", "never measured", limit=1.0)
    _, _, *found = ratio_table([low, high, unknown], figures)
    assert found == [
        "| low | 0.20 (0.10-0.50) | at most 0.15 | missed |",
        "| high | 5.00 (2.00-10.00) | at least 1.6 | met |",
    ]


@pytest.mark.slow
def test_extraction_is_measured_against_its_bare_encoder(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, BENCH / "extract.py", "--quick", "--keep", tmp_path / "work"]
    done = subprocess.run(
        [*map(str, command), "--json", str(out)], capture_output=True, text=True, timeout=1_200
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["table"]}
    assert rows["mn04 command float16, whole"]["ratios"]["bare encode"]["median"] > 0
    assert rows["ceiling command float16, whole"]["clips_per_s"] > 0
    assert found["figures"]["memory"]["mn04 command float16"] > 2**20
    if not any("h5py" in note for note in found["notes"]):
        assert rows["mn04 usual loop, without start-up"]["clips_per_s"] > 0
    assert not list((tmp_path / "work").glob("*.bank"))
    assert "--quick leaves out vit-s" in done.stdout


def test_ratios_of_extraction_are_paired_and_nothing_is_made_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from extract_audio import AudioPool
    from extract_cases import Case
    from extract_report import Figures, lines_of, print_lines, profile_table
    from extract_runs import without_start_up

    figures = Figures()
    for number, (bare, whole) in enumerate([(10.0, 9.0), (100.0, 50.0), (20.0, 14.0)]):
        figures.add("x bare encode: a", number, bare)
        figures.add("x bare encode: b", number, bare / 2)
        figures.add("x command float16, whole", number, whole)
        figures.add("x command float16, without start-up", number, without_start_up({"clips": 3}))
    figures.add("x usual loop, whole", 1, 10.0)
    case = Case("x", "x", AudioPool(Path(), 16_000, "wav", 1))
    lines = {line.name: line for line in lines_of(figures, case)}
    assert "x command float16, without start-up" not in lines
    ratios = lines["x command float16, whole"].ratios
    assert set(ratios) == {"bare encode", "the usual loop"}
    assert (ratios["bare encode"].median, ratios["bare encode"].lowest) == (0.7, 0.5)
    assert (ratios["the usual loop"].median, ratios["the usual loop"].n_rounds) == (5.0, 1)
    print_lines(list(lines.values()))
    assert "| 0.70 (0.50-0.90) of bare encode; 5.00 (one round) of" in capsys.readouterr().out
    assert without_start_up({"profile": {"n_clips": 6, "elapsed_s": 3.0}}) == 2.0
    profile = {"n_clips": 6, "elapsed_s": 3.0, "advice": "decode: more cores"}
    table = list(profile_table("x", profile | {"stages": {"decode": {"busy_s": 1.5}}}))
    assert table[0] == "profile of x: 6 clips in 3.0 s"
    assert "| decode | 1.5 |" in table
    assert "fix next: decode: more cores" in table


def test_a_stream_that_fails_ends_the_bare_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from extract_bare import BareJob, measure

    job = BareJob("x", None, "cpu", batch_size=4, seconds=0.0, n_streams=2)
    steps: list[int] = []

    def step(stream: int, index: int) -> int:
        steps.append(stream)
        if stream == 1 and index == 2:
            raise ValueError("no tokens")
        return 4

    with pytest.raises(ValueError, match="no tokens"):
        measure(step, job)
    assert set(steps) == {0, 1}
    assert measure(lambda stream, index: 4, job) > 0


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
