"""Ctrl-C at a moment when everything is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stopping_between_batches() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of a batch, which it is asked for; a second one does not.

    Where signals cannot be handled (another thread, or somebody else handles this one) all is as
    it was.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield lambda: False
        return
    was_asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        was_asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, ask)
    try:
        yield was_asked.is_set
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
