"""Which workers a machine gets; the machine is described, so no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest

from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.settings import ExtractionSettings
from patchbank.pipeline.workplace import Machine, local_workers

CPU, BOX = Machine(n_cores=8, n_gpus=0), Machine(n_cores=64, n_gpus=4)


@pytest.mark.parametrize(
    ("machine", "asked", "workers"),
    [
        pytest.param(CPU, {}, [("cpu-0", "cpu", 8, 8)], id="one for the CPU has all cores"),
        pytest.param(CPU, {"devices": "cpu", "n_threads": 3}, [("cpu-0", "cpu", 3, 8)], id="cpu"),
        pytest.param(
            CPU,
            {"n_workers": 2},
            [("cpu-0", "cpu", 4, 4), ("cpu-1", "cpu", 4, 4)],
            id="workers share the cores",
        ),
        pytest.param(
            Machine(2, 0),
            {"n_workers": 4},
            [(f"cpu-{index}", "cpu", 1, 2) for index in range(4)],
            id="more workers than cores",
        ),
        pytest.param(
            CPU,
            {"n_workers": 2, "n_threads": 1, "n_decode_threads": 3},
            [("cpu-0", "cpu", 1, 3), ("cpu-1", "cpu", 1, 3)],
            id="as asked",
        ),
        pytest.param(
            BOX,
            {"devices": "all"},
            [(f"cuda:{index}", f"cuda:{index}", 16, 16) for index in range(4)],
            id="a worker for each GPU",
        ),
        pytest.param(
            BOX,
            {"devices": "cuda:3,cuda:1"},
            [("cuda:3", "cuda:3", 32, 16), ("cuda:1", "cuda:1", 32, 16)],
            id="some GPUs",
        ),
        pytest.param(
            Machine(256, 1), {"devices": "all"}, [("cuda:0", "cuda:0", 256, 16)], id="one GPU"
        ),
        pytest.param(BOX, {"n_workers": 1}, [("cpu-0", "cpu", 64, 8)], id="a CPU beside GPUs"),
    ],
)
def test_workers_share_a_machine(
    machine: Machine, asked: dict[str, Any], workers: list[tuple[str, str, int, int]]
) -> None:
    found = local_workers(machine, **asked)
    assert [(w.name, w.device, w.n_threads, w.n_decode_threads) for w in found] == workers


@pytest.mark.parametrize(
    ("machine", "asked", "words"),
    [
        (CPU, {"devices": "all"}, "--devices all and no GPU here; --workers N starts CPU workers"),
        (CPU, {"devices": "cuda:0"}, "--devices cuda:0 and no GPU here; --workers N starts CPU"),
        (BOX, {"devices": "cuda:4"}, "no device cuda:4 here, expected some of cuda:0, cuda:1, cud"),
        (BOX, {"devices": "gpu0"}, "--devices gpu0, expected all, cpu, or cuda:0,cuda:2"),
        (BOX, {"devices": "cuda:1,cuda:1"}, "expected all, cpu, or cuda:0,cuda:2"),
        (BOX, {"devices": "cpu,cuda:1"}, "expected all, cpu, or cuda:0,cuda:2"),
        (BOX, {"devices": "all", "n_workers": 2}, "--devices all and --workers 2, expected one of"),
    ],
)
def test_devices_that_are_not_there_are_refused(
    machine: Machine, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(PatchbankError, match=words):
        local_workers(machine, **asked)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"device": "cpu", "devices": "cuda:0"},
            "found --device cpu and --devices cuda:0, expected one of them",
        ),
        ({"device": "cuda", "n_workers": 2}, "found --device cuda and --workers 2, expected one"),
        (
            {"scheduler": "tcp://a:1", "n_threads": 2},
            "found --scheduler and --threads 2, .* `patchbank worker tcp://a:1 --threads 2`",
        ),
        ({"scheduler": "tcp://a:1", "devices": "all"}, "found --scheduler and --devices all"),
    ],
)
def test_contradicting_settings_are_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PatchbankError, match=words):
        ExtractionSettings(**settings)


def test_the_process_of_a_gpu_sees_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = local_workers(BOX, devices="cuda:0,cuda:2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert second.environment()["CUDA_VISIBLE_DEVICES"] == "2"
    # As a batch system hands GPUs out: the first that is visible is cuda:0.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-1a2b,7")
    assert [w.environment()["CUDA_VISIBLE_DEVICES"] for w in (first, second)] == ["5", "7"]
    assert {w.environment()["PATCHBANK_DEVICE"] for w in (first, second)} == {"cuda:0"}


def test_a_process_is_told_of_its_threads() -> None:
    (shared, _) = local_workers(CPU, n_workers=2)
    assert shared.environment()["OMP_NUM_THREADS"] == "4"
    assert shared.environment()["PATCHBANK_THREADS"] == "4"
    (alone,) = local_workers(CPU)
    assert alone.environment()["PATCHBANK_THREADS"] == "8"
