"""Progress on stderr: a bar on a terminal, plain lines where stderr is a file or a pipe.

Everything that may take over two seconds goes through `Bar`. A step only notes two numbers; what
is drawn, and when, a thread of the bar decides, so that no loop is slower for being watched.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from patchbank.cli.progress_text import BYTES, CLIPS, EPOCHS, Pace, State, Unit

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from patchbank.pipeline.extraction import Progress as ExtractionProgress
    from patchbank.probing.training import Event

TICK_S = 0.1
FIRST_DRAWN_S = 0.5
"""A bar appears with its first step, or after this: quick work leaves no trace."""
Step = Callable[[int, int], None]
"""Takes how much is done, and of how much."""


@runtime_checkable
class Stream(Protocol):
    """Where progress goes."""

    def isatty(self) -> bool: ...
    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...


class Bar:
    """The progress of some work; a context manager, one at a time.

    Where it took no step and was quick, nothing of it is seen. `vanishes`: at its end nothing is
    left of it on a terminal, and of quick work nothing is written. `began_s` is by
    `time.monotonic`.
    """

    def __init__(
        self,
        title: str,
        unit: Unit = CLIPS,
        *,
        vanishes: bool = False,
        began_s: float | None = None,
    ) -> None:
        self.state = State(title, unit, time.monotonic() if began_s is None else began_s)
        stream = sys.stderr
        self._display: _Terminal | _Lines = (
            _Terminal(self.state, vanishes=vanishes)
            if is_terminal(stream)
            else _Lines(self.state, stream, tells_end=not vanishes)
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def step(self, completed: float, total: float, note: str = "") -> None:
        """So much is done."""
        self.state.completed, self.state.total, self.state.note = completed, total, note

    def _watch(self) -> None:
        while not self._ended.wait(TICK_S):
            self.state.sample(time.monotonic())
            self._display.tick(time.monotonic())

    def __enter__(self) -> Bar:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._display.end(time.monotonic(), is_whole=kind is None)


def is_terminal(stream: Stream) -> bool:
    """Whether a stream can draw: a terminal that knows how to move back."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class _Lines:
    """Lines without any control character."""

    def __init__(self, state: State, stream: Stream, *, tells_end: bool) -> None:
        self._state, self._stream, self._pace = state, stream, Pace()
        self._tells_end, self._has_written = tells_end, False

    def tick(self, now_s: float) -> None:
        if self._pace.is_due(now_s - self._state.began_s, self._state.share):
            self._write(self._state.text(now_s))

    def end(self, now_s: float, *, is_whole: bool) -> None:
        if self._has_written or (self._tells_end and self._state.total is not None):
            self._write(self._state.last_text(now_s, is_whole=is_whole))

    def _write(self, text: str) -> None:
        self._has_written = True
        # One call: lines of other threads stay whole.
        self._stream.write(f"{self._state.title.strip()}: {text}\n")
        self._stream.flush()


class _Terminal:
    """A bar that is drawn again and again."""

    def __init__(self, state: State, *, vanishes: bool) -> None:
        self._state, self._vanishes = state, vanishes
        self._rich: tuple[RichProgress, TaskID] | None = None

    def tick(self, now_s: float) -> None:
        state = self._state
        if self._rich is None and state.total is None and now_s - state.began_s < FIRST_DRAWN_S:
            return
        self._draw(state.text(now_s))

    def end(self, now_s: float, *, is_whole: bool) -> None:
        state = self._state
        if self._rich is None and state.total is None:
            return
        self._draw(state.last_text(now_s, is_whole=is_whole))
        assert self._rich is not None
        bar, _ = self._rich
        bar.live.transient = self._vanishes or state.total is None
        bar.stop()

    def _draw(self, text: str) -> None:
        if self._rich is None:
            self._rich = self._begun(text)
        bar, task = self._rich
        state = self._state
        bar.update(
            task, completed=state.completed, total=state.total, text=text, description=state.title
        )
        bar.refresh()

    def _begun(self, text: str) -> tuple[RichProgress, TaskID]:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
        )
        bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
        task = bar.add_task(escape(self._state.title), total=None, text=text)
        bar.start()
        return bar, task


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Work of unknown length: seen where it takes longer than a moment."""
    with Bar(title):
        yield


@contextmanager
def count_bar(title: str, unit: str, *, vanishes: bool = False) -> Iterator[Step]:
    """Things that are counted, such as files, and the time left."""
    with Bar(title, Unit(unit), vanishes=vanishes) as bar:
        yield bar.step


@contextmanager
def byte_bar(title: str) -> Iterator[Step]:
    """Bytes, speed and the time left."""
    with Bar(title, BYTES) as bar:
        yield bar.step


@contextmanager
def clip_bar(title: str) -> Iterator[Callable[[ExtractionProgress], None]]:
    """Clips, clips a second, the time left and failures."""
    with Bar(title, CLIPS) as bar:

        def step(state: ExtractionProgress) -> None:
            notes = [
                f"{state.n_failed} failed" if state.n_failed else "",
                f"{state.n_workers} workers" if state.n_workers > 1 else "",
                state.doing,
            ]
            bar.step(state.n_encoded, state.n_clips, ", ".join(filter(None, notes)))

        yield step


@contextmanager
def progress_lines() -> Iterator[Callable[[Event], None]]:
    """A bar for each stage of training, one after the other: epochs, the time left."""
    from patchbank.probing.training import Step as TrainingStep

    with ExitStack() as stack:
        current = stack.enter_context(Bar("prepare", EPOCHS, vanishes=True))

        def show(event: Event) -> None:
            nonlocal current
            if not isinstance(event, TrainingStep):
                return
            if event.stage != current.state.title:
                stack.close()
                current = stack.enter_context(Bar(event.stage, EPOCHS, vanishes=True))
            done = event.n_epochs * event.n_steps_done / event.n_steps
            is_last = event.n_steps_done == event.n_steps
            current.step(done, event.n_epochs, "scoring" if is_last else "")

        yield show


@contextmanager
def recording_bar(title: str) -> Iterator[Callable[[int, float, int], None]]:
    """Recordings that are done, and the time left; `part` is how much of the next is done."""
    with Bar(title, Unit("recordings")) as bar:
        yield lambda n_done, part, n: bar.step(n_done + part, n)
