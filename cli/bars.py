"""Progress bars on stderr, which appear with the first step and leave no trace without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from patchbank.pipeline.extraction import Progress as ExtractionProgress


@contextmanager
def _bar(title: str, *columns: ProgressColumn, **fields: Any) -> Iterator[Callable[..., None]]:
    """Gives what draws a step: `completed`, `total`, and the fields that the columns print."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    first = (TextColumn("{task.description}"), BarColumn(bar_width=24))
    # A batch of a large encoder on a CPU may take a minute: speed is that of the last five.
    bar = Progress(*first, *columns, console=Console(stderr=True), speed_estimate_period=300)
    task = bar.add_task(title, total=None, **fields)

    def show(*, completed: float, total: float, **more: Callable[[float | None], str]) -> None:
        speed = bar.tasks[task].finished_speed or bar.tasks[task].speed
        texts: dict[str, Any] = {name: text(speed) for name, text in more.items()}
        bar.update(task, completed=completed, total=total, **texts)
        if not bar.live.is_started:
            bar.start()

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def byte_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Bytes, speed and the time left."""
    from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with _bar(title, *columns) as show:
        yield lambda n_read, n_bytes: show(completed=n_read, total=n_bytes)


@contextmanager
def shard_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shards and the time left."""
    from rich.progress import TextColumn, TimeRemainingColumn

    count = TextColumn("{task.completed:.0f}/{task.total:.0f} shards")
    with _bar(title, count, TimeRemainingColumn()) as show:
        yield lambda n_done, n_shards: show(completed=n_done, total=n_shards)


@contextmanager
def clip_bar(title: str) -> Iterator[Callable[[ExtractionProgress], None]]:
    """Clips, clips a second, failures and the time left."""
    from rich.progress import TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.completed:.0f}/{task.total:.0f} clips"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}{task.fields[workers]}"),
    )
    with _bar(title, *columns, rate="", failed="", workers="") as show:

        def step(state: ExtractionProgress) -> None:
            show(
                completed=state.n_encoded,
                total=state.n_clips,
                rate=lambda speed: f"{speed:.{0 if speed > 9 else 1}f} clips/s" if speed else "",
                failed=lambda _: f"{state.n_failed} failed " if state.n_failed else "",
                workers=lambda _: f"{state.n_workers} workers" if state.n_workers > 1 else "",
            )

        yield step


@contextmanager
def recording_bar(title: str) -> Iterator[Callable[[int, float, int], None]]:
    """Recordings that are done, and the time left; `part` is how much of the next is done."""
    from rich.progress import TextColumn, TimeRemainingColumn

    count = TextColumn("{task.fields[done]}/{task.total:.0f} recordings")
    with _bar(title, count, TimeRemainingColumn(), done="0") as show:
        yield lambda n_done, part, n: show(
            completed=n_done + part, total=n, done=lambda _: str(n_done)
        )
