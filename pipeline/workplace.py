"""Where an extraction runs: on which devices of this machine, with how many cores each."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from patchbank.pipeline.errors import PatchbankError

DEVICE, THREADS, DECODE_THREADS = (
    f"PATCHBANK_{name}" for name in ("DEVICE", "THREADS", "DECODE_THREADS")
)
"""Variables by which a worker process knows its share of the machine."""
MOST_DECODERS, MOST_DECODERS_OF_A_GPU = 8, 16


@dataclass(frozen=True)
class Machine:
    """What workers may share."""

    n_cores: int
    n_gpus: int

    @classmethod
    def here(cls) -> Machine:
        """This one; counting its GPUs makes no context on any."""
        import torch
        from dask.system import CPU_COUNT  # knows of cgroups and affinity

        return cls(CPU_COUNT, torch.cuda.device_count())


@dataclass(frozen=True)
class LocalWorker:
    """One worker's share of this machine."""

    name: str
    device: str
    n_threads: int
    """Cores that a CPU computes with."""
    n_decode_threads: int

    def environment(self) -> dict[str, str]:
        """Variables for a process of its own."""
        variables = {DEVICE: self.device, DECODE_THREADS: str(self.n_decode_threads)}
        if self.n_threads is not None:
            names = (THREADS, "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
            variables |= dict.fromkeys(names, str(self.n_threads))
        if self.device.startswith("cuda:"):
            # A process that sees one GPU cannot leave memory on another: threads that pin memory
            # would open a context on the first.
            index = int(self.device.removeprefix("cuda:"))
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
            variables[DEVICE] = "cuda:0"
        return variables


@dataclass(frozen=True)
class Workplace:
    """A Dask scheduler that exists, or workers of this machine."""

    scheduler: str | None = None
    workers: tuple[LocalWorker, ...] = ()

    def __str__(self) -> str:
        return self.scheduler or "this machine"


def local_workers(
    machine: Machine,
    *,
    devices: str | None = None,
    n_workers: int | None = None,
    n_threads: int | None = None,
    n_decode_threads: int | None = None,
) -> tuple[LocalWorker, ...]:
    """One worker for each device that `devices` names, or `n_workers` CPU workers, or one.

    They share the cores evenly. Raises `PatchbankError` for devices that are not there.
    """
    names = _devices(machine, devices)
    if n_workers is not None and names != ["cpu"]:
        raise PatchbankError(
            f"found --devices {devices} and --workers {n_workers}, expected one of them: --devices "
            "starts a worker for each GPU, --workers starts CPU workers"
        )
    n = n_workers or len(names)
    share = n_threads or max(1, machine.n_cores // n)
    return tuple(
        LocalWorker(
            name=f"cpu-{index}" if device == "cpu" else device,
            device=device,
            n_threads=share,
            n_decode_threads=n_decode_threads or decode_threads(machine, device, n),
        )
        for index, device in enumerate(names * n if names == ["cpu"] else names)
    )


def decode_threads(machine: Machine, device: str, n_workers: int) -> int:
    """Threads that decode for one of so many workers: it waits for disks too, so two at least."""
    if device == "cpu":
        return min(MOST_DECODERS, max(2, machine.n_cores // n_workers))
    return min(MOST_DECODERS_OF_A_GPU, max(2, machine.n_cores // max(1, machine.n_gpus)))


def _devices(machine: Machine, text: str | None) -> list[str]:
    if text in (None, "cpu"):
        return ["cpu"]
    here = [f"cuda:{index}" for index in range(machine.n_gpus)]
    names = here if text == "all" else text.split(",")
    for name in names:
        if not re.fullmatch(r"cuda:\d+", name) or names.count(name) > 1:
            raise PatchbankError(f"found --devices {text}, expected all, cpu, or cuda:0,cuda:2")
    if not here:
        raise PatchbankError(
            f"found --devices {text} and no GPU here; --workers N starts CPU workers"
        )
    if missing := [name for name in names if name not in here]:
        raise PatchbankError(
            f"found no device {missing[0]} here, expected some of {', '.join(here)}"
        )
    return names
