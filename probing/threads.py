"""Work over parts of an array on all cores, for what lets go of the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_threads(function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    """`function` of every task, in order, from as many threads as there are cores."""
    n_threads = min(len(tasks), os.cpu_count() or 1)
    if n_threads < 2:
        return [function(task) for task in tasks]
    with ThreadPoolExecutor(n_threads, thread_name_prefix="patchbank-scores") as pool:
        return list(pool.map(function, tasks))
