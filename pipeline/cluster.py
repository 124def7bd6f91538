"""Workers and the scheduler that hands them work: in this process, in several, or elsewhere."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import dask
from distributed import Client, LocalCluster, Nanny, Scheduler, Security, SpecCluster, rpc
from distributed.comm.addressing import get_address_host_port

from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.workplace import LocalWorker, Workplace

SHARDS_PER_WORKER = 2
"""Shard tasks that run at once in a worker, so that its pipeline never drains between shards."""
FIRST_WORKER_S = 60.0
"""How long an extraction waits for a first worker."""
LOOPBACK = "127.0.0.1"
T = TypeVar("T")
UNSEEN = {"dashboard_address": f"{LOOPBACK}:0"}
"""Dask's default would listen on every interface of the machine."""
PROCESSES = {
    # Daemons could not have processes that decode.
    "distributed.worker.daemon": False,
    # Dask would set OMP_NUM_THREADS=1 in this process for its children, and an option of malloc
    # that gives every freed tensor back to the system.
    "distributed.nanny.pre-spawn-environ": {},
    # A worker that was killed comes back when it has loaded torch.
    "distributed.deploy.lost-worker-timeout": "300s",
}


@contextmanager
def open_client(workplace: Workplace) -> Iterator[Client]:
    """A client of a scheduler with workers; `PatchbankError` where there are none."""
    if workplace.scheduler is not None:
        with _connected(workplace.scheduler) as client:
            yield client
        return
    inside = len(workplace.workers) == 1
    with (
        _in_this_process() if inside else _in_processes(workplace.workers) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def _connected(scheduler: str) -> Iterator[Client]:
    _check_address(scheduler)
    try:
        client = Client(scheduler, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise _no_scheduler(scheduler) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=FIRST_WORKER_S)
        except TimeoutError as error:
            raise PatchbankError(
                f"the scheduler at {scheduler} has no worker; start some with `patchbank worker "
                f"{scheduler}` where patchbank is installed"
            ) from error
        yield client


def ask_worker(scheduler: str, function: Callable[..., T], *arguments: object) -> T:
    """What a function says on some worker; raises as `open_client` does."""
    with _connected(scheduler) as client:
        answer: T = client.submit(function, *arguments, pure=False).result()
        return answer


def _check_address(scheduler: str) -> None:
    if scheduler.startswith("inproc://"):
        return  # of this process: no host and port
    try:
        get_address_host_port(scheduler, strict=True)
    except ValueError as error:
        raise PatchbankError(
            f"{scheduler!r} is no address, expected what `dask scheduler` prints, such as "
            "tcp://10.0.0.1:8786"
        ) from error


def _no_scheduler(address: str) -> PatchbankError:
    return PatchbankError(
        f"no Dask scheduler answers at {address}; start one with `dask scheduler`"
    )


def _in_this_process() -> LocalCluster:
    return LocalCluster(
        n_workers=1,
        threads_per_worker=SHARDS_PER_WORKER,
        processes=False,
        # Memory is bounded; Dask would pause a worker at 80 % of the machine's.
        memory_limit=0,
        **UNSEEN,
        worker_dashboard_address=UNSEEN["dashboard_address"],
        silence_logs=logging.CRITICAL,
    )


@contextmanager
def _in_processes(workers: Sequence[LocalWorker]) -> Iterator[SpecCluster]:
    nannies = {
        worker.name: {"cls": Nanny, "options": nanny_options(worker) | {"host": LOOPBACK}}
        for worker in workers
    }
    scheduler = {
        "cls": Scheduler,
        "options": {"host": LOOPBACK, "port": 0, "dashboard": False, **UNSEEN},
    }
    with _quiet(), _environment_kept(), dask.config.set(PROCESSES):
        # Quick and empty: Ctrl-C while workers start finds something that can be closed.
        with _hiding_ctrl_c():
            cluster = SpecCluster(scheduler=scheduler)
        with cluster:
            cluster.worker_spec.update(nannies)
            cluster.scale(len(nannies))
            try:
                cluster.wait_for_workers(len(nannies), timeout=FIRST_WORKER_S)
            except TimeoutError as error:
                raise PatchbankError(
                    f"{len(nannies)} worker processes did not start; a script that calls extract "
                    "must do so below `if __name__ == '__main__':`"
                ) from error
            yield cluster


def nanny_options(worker: LocalWorker) -> dict[str, Any]:
    """Of a worker in a process of its own, which is started again when it dies."""
    return {
        "name": worker.name,
        "nthreads": SHARDS_PER_WORKER,
        "memory_limit": 0,
        "env": worker.environment(),
        "silence_logs": logging.CRITICAL,
        "dashboard": False,
        **UNSEEN,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Logs nothing of what Ctrl-C cuts short, even when the cluster has ended."""
    loggers = [logging.getLogger(name) for name in ("distributed", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Takes variables back that Dask sets in this process for its children."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _hiding_ctrl_c() -> Iterator[None]:
    """Threads begun meanwhile, and the processes that they begin, never see Ctrl-C.

    A terminal sends it to all processes: workers would end at once, with a traceback each.
    """
    # Whatever starts Python's tracker of processes lets Ctrl-C through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(scheduler: str, workers: Sequence[LocalWorker], *, started: Callable[[], None]) -> None:
    """Runs workers for a scheduler that exists until it goes away; Ctrl-C ends them and is raised.

    `started` is called when the scheduler knows them.
    """
    _check_address(scheduler)
    loop = asyncio.new_event_loop()
    task = loop.create_task(_serve(scheduler, workers, started))
    with _quiet(), _environment_kept(), dask.config.set(PROCESSES), ThreadPoolExecutor(1) as pool:
        # Ctrl-C comes to the main thread.
        with _hiding_ctrl_c():
            ended = pool.submit(loop.run_until_complete, asyncio.wait([task]))
        try:
            ended.result()
        finally:
            loop.call_soon_threadsafe(task.cancel)
            ended.result()
            loop.close()
    try:
        task.result()
    except (OSError, TimeoutError) as error:
        raise _no_scheduler(scheduler) from error


async def _serve(
    scheduler: str, workers: Sequence[LocalWorker], started: Callable[[], None]
) -> None:
    # The workers of several machines must not share a name.
    here = f"{socket.gethostname()}-{os.getpid()}"
    security = Security().get_connection_args("client")
    async with rpc(scheduler, connection_args=security) as remote:
        await remote.identity()
    async with AsyncExitStack() as stack:
        nannies = [
            Nanny(scheduler, **nanny_options(worker) | {"name": f"{here}-{worker.name}"})
            for worker in workers
        ]
        await asyncio.gather(*map(stack.enter_async_context, nannies))
        started()
        await asyncio.gather(*(nanny.finished() for nanny in nannies))
