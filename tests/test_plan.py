from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchbank.probing.plan import batches, sequential

SIZES = {"n_rows": st.integers(0, 300), "batch_size": st.integers(1, 50)}


@given(**SIZES, seed=st.integers(0, 2**31), epoch=st.integers(0, 100))
def test_each_row_comes_once_and_only_the_last_batch_is_short(
    n_rows: int, batch_size: int, seed: int, epoch: int
) -> None:
    rows = np.arange(n_rows) * 3
    plan = batches(rows, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate([rows[:0], *plan])) == sorted(rows)
    assert all(len(batch) == batch_size for batch in plan[:-1])
    assert all(1 <= len(batch) <= batch_size for batch in plan[-1:])


def test_the_same_arguments_give_the_same_plan() -> None:
    first, second = (batches(np.arange(50), batch_size=8, seed=3, epoch=4) for _ in range(2))
    assert np.array_equal(np.concatenate(first), np.concatenate(second))


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 5}], ids=["seed", "epoch"])
def test_another_seed_or_epoch_gives_another_order(change: dict[str, int]) -> None:
    usual = {"seed": 3, "epoch": 4}
    first = np.concatenate(batches(np.arange(50), batch_size=8, **usual))
    second = np.concatenate(batches(np.arange(50), batch_size=8, **(usual | change)))
    assert not np.array_equal(first, second)


def test_a_plan_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    batches(np.arange(50), batch_size=8, seed=0, epoch=0)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@given(**SIZES)
def test_sequential_batches_keep_the_order(n_rows: int, batch_size: int) -> None:
    rows = np.arange(n_rows)[::-1]
    plan = sequential(rows, batch_size=batch_size)
    assert np.array_equal(np.concatenate([rows[:0], *plan]), rows)


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="found batch_size=0, expected at least 1"):
        sequential(np.arange(3), batch_size=0)
