"""`patchbank worker`: this machine works for a Dask scheduler."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from patchbank.cli.worker_options import Devices, Threads, WorkerCount


def worker(
    scheduler: Annotated[
        str, typer.Argument(metavar="SCHEDULER", help="Its address: tcp://10.0.0.1:8786.")
    ],
    devices: Devices = None,
    workers: WorkerCount = None,
    threads: Threads = None,
) -> None:
    """Work on extractions that are given to a Dask scheduler, until it ends or Ctrl-C.

    Without options: a worker for each GPU, or one for the CPU.
    """
    from patchbank.pipeline.cluster import serve
    from patchbank.pipeline.workplace import Machine, local_workers

    machine = Machine.here()
    if devices is None and workers is None and machine.n_gpus:
        devices = "all"
    shares = local_workers(machine, devices=devices, n_workers=workers, n_threads=threads)

    def started() -> None:
        names = ", ".join(share.name for share in shares)
        print(f"{len(shares)} worker(s) at {scheduler}: {names}; Ctrl-C ends them", flush=True)

    try:
        serve(scheduler, shares, started=started)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    else:
        print(f"the scheduler at {scheduler} has gone", file=sys.stderr)
