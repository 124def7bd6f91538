"""`bank.rows_view`: an array of tokens that reads none before it is asked."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audio_sets import write_clip_set
from loader_banks import FAILED, N_CLIPS, N_DONE, make_bank, reference
from made_views import MADE, N_ROWS
from sklearn.model_selection import KFold, train_test_split
from sklearn.utils import _safe_indexing, shuffle

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.rows_view import RowsView
from patchbank.pipeline.errors import BankCorrupt, BankError
from patchbank.pipeline.extraction import extract
from patchbank.pipeline.specs import StoredDType
from patchbank.probing import BatchLoader


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("view"))


@pytest.fixture
def view(bank: Bank) -> RowsView:
    return bank.rows_view(layer=1)


def test_a_view_has_the_shape_of_the_rows_with_tokens(bank: Bank) -> None:
    view = bank.rows_view()
    assert (view.shape, view.ndim, len(view), view.layer) == ((N_DONE, 10, 12), 3, N_DONE, 2)
    assert (view.dtype, view.nbytes, view.bank) == (np.float16, N_DONE * 10 * 12 * 2, bank)
    assert view.rows.tolist() == [row for row in range(N_CLIPS) if row != FAILED]
    ids = np.array(bank.clips["clip_id"].to_pylist())
    assert view[[3, 1]].clips["clip_id"].to_pylist() == ids[view.rows[[3, 1]]].tolist()


def test_an_array_of_it_holds_the_tokens_of_its_rows(bank: Bank, view: RowsView) -> None:
    tokens = reference(bank, 1, "patches")[view.rows]
    np.testing.assert_array_equal(np.asarray(view), tokens, strict=True)
    np.testing.assert_array_equal(view[...], tokens, strict=True)
    np.testing.assert_array_equal(view[:0], tokens[:0], strict=True)
    assert np.asarray(view, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="have to be read: an array of them is a copy"):
        np.asarray(view, copy=False)


KEYS: dict[str, Any] = {
    "slice": slice(3, 20, 4),
    "backwards": slice(None, None, -1),
    "positions": np.array([5, 2, 40]),
    "repeated": [7, 7, 0],
    "from the end": np.array([-1, -44]),
    "mask": np.arange(N_DONE) % 3 == 0,
    "list of a mask": [True, False] * 22,
    "none": [],
    "unsigned": np.array([1, 2], np.uint8),
    "with an ellipsis": (np.array([4, 1]), ...),
    "slice with an ellipsis": (slice(2, 5), Ellipsis),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_clips_are_picked_as_numpy_picks_them(view: RowsView, key: Any) -> None:
    picked, tokens = view[key], np.asarray(view)
    assert isinstance(picked, RowsView)
    assert "_tokens" not in picked.__dict__  # nothing has been read
    np.testing.assert_array_equal(np.asarray(picked), tokens[key], strict=True)


@pytest.mark.parametrize("key", [0, -1, np.int64(5), np.array(7), torch.tensor(3), (2, ...)])
def test_a_number_gives_the_tokens_of_that_clip(view: RowsView, key: Any) -> None:
    clip = view[key]
    assert isinstance(clip, np.ndarray)
    number = int(key[0] if isinstance(key, tuple) else key)
    np.testing.assert_array_equal(clip, np.asarray(view)[number], strict=True)


def test_iterating_gives_clip_by_clip(view: RowsView) -> None:
    assert np.array_equal(np.stack(list(view[:3])), np.asarray(view)[:3])


WRONG: dict[str, tuple[Any, str]] = {
    "beyond": (44, "index 44 is out of bounds for axis 0 with size 44"),
    "list beyond": ([1, 44], "index 44 is out of bounds"),
    "before": (-45, "index -45 is out of bounds"),
    "short mask": (np.ones(3, bool), "boolean index did not match"),
    "float": (1.5, "only integers, slices"),
    "floats": (np.array([1.0]), "arrays used as indices must be of integer"),
    "name": ("a", "only integers, slices"),
    "table": (np.zeros((2, 2), int), "found the index .* expected a number, a slice, row pos"),
    "new axis": (None, "found the index None"),
    "true": (True, "found the index True"),
    "patch": ((slice(None), 0), r"read the tokens first: np.asarray\(view\)\[\.\.\.\]"),
    "dim": ((..., 0), "found the index"),
    "three": ((1, 2, 3), "found the index"),
}


@pytest.mark.parametrize(("key", "message"), WRONG.values(), ids=WRONG)
def test_any_other_index_is_refused(view: RowsView, key: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        view[key]


def test_scikit_learn_splits_and_shuffles_it_without_reading(view: RowsView) -> None:
    train, test = train_test_split(view, test_size=0.25, random_state=0)
    assert sorted([*train.rows, *test.rows]) == view.rows.tolist()
    [(first, _), *_] = KFold(4).split(view)
    assert _safe_indexing(view, first).rows.tolist() == view.rows[first].tolist()
    assert _safe_indexing(view, np.arange(44) < 2).shape == (2, 20, 8)
    mixed = shuffle(view, random_state=1)
    assert isinstance(mixed, RowsView)
    assert set(mixed.rows) == set(view.rows)
    assert "_tokens" not in mixed.__dict__


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "int4"])
def test_tokens_of_every_stored_type_are_floats(tmp_path: Path, dtype: StoredDType) -> None:
    bank = make_bank(tmp_path, dtype)
    view = bank.rows_view(rows=[9, 3, 9])
    assert view.dtype == np.float32
    for batch in BatchLoader(bank, rows=np.array([9, 3, 9]), shuffle=False, tier="read"):
        expected = batch.patches.float().numpy()
    np.testing.assert_allclose(np.asarray(view), expected, rtol=1e-6, atol=1e-7)


def test_an_archive_can_be_viewed(bank: Bank, tmp_path: Path) -> None:
    from patchbank.cli.main import main

    out = tmp_path / "a.bank"
    assert main(["bank", "convert", str(bank.path), "--archive", "--out", str(out)]) == 0
    found = np.asarray(open_bank(out).rows_view(rows=[1, 2]))
    np.testing.assert_array_equal(found, np.asarray(bank.rows_view(rows=[1, 2])))


def test_views_of_clips_are_left_out_unless_they_are_named(tmp_path: Path) -> None:
    table = write_clip_set(tmp_path, n_clips=40)
    bank = extract(table, encoder="fake", out=tmp_path / "v.bank", settings=MADE)
    assert bank.n_rows == N_ROWS
    clean = bank.rows_view()
    assert set(clean.clips["view"].to_pylist()) == {0}
    assert len(clean) == 40
    assert len(bank.rows_view(rows=np.arange(N_ROWS))) == N_ROWS


REFUSED: dict[str, tuple[Any, str]] = {
    "failed": (
        [3, FAILED],
        "row 7 has no tokens: its clip failed, or it is a hole; choose",
    ),
    "beyond": ([0, 45], "found rows from 0 to 45, expected 0 to 44 in .*x.bank"),
    "negative": ([-1, 0], "found rows from -1 to 0"),
    "mask": (np.ones(45, bool), r"of a mask these are np.flatnonzero\(mask\)"),
    "table": (np.zeros((2, 2), int), r"found rows of shape \(2, 2\) and type int64"),
}


@pytest.mark.parametrize(("rows", "message"), REFUSED.values(), ids=REFUSED)
def test_rows_that_are_none_are_refused(bank: Bank, rows: Any, message: str) -> None:
    with pytest.raises(BankError, match=message):
        bank.rows_view(rows=rows)


def test_a_layer_that_is_not_there_is_refused(bank: Bank) -> None:
    with pytest.raises(BankError, match=r"has no layer 3; it has \[1, 2\]"):
        bank.rows_view(layer=3)


def test_its_name_says_how_much_it_is(bank: Bank) -> None:
    assert repr(bank.rows_view()[:2]) == (
        f"RowsView(clip=2, patch=10, dim=12, float16, 480 B: layer 2 of {bank.path})"
    )


def test_a_pickle_holds_no_tokens_and_reads_the_same(bank: Bank, view: RowsView) -> None:
    tokens = np.asarray(view)
    assert bank.clips is not None
    content = pickle.dumps(view)
    assert len(content) < tokens.nbytes
    code = (
        "import pickle, sys; import numpy as np\n"
        "view = pickle.load(sys.stdin.buffer)\n"
        "assert 'torch' not in sys.modules\n"
        "sys.stdout.buffer.write(np.asarray(view[::-1]).tobytes())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == tokens[::-1].tobytes()


def test_viewing_imports_neither_torch_nor_audio(bank: Bank) -> None:
    code = (
        "import sys\n"
        "from patchbank.pipeline.bank import open_bank\n"
        f"open_bank({str(bank.path)!r}).rows_view()[0]\n"
        "heavy = {'torch', 'sklearn', 'pandas', 'soundfile', 'patchbank.pipeline.encoders'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_damaged_tokens_are_told_from_their_checksum(bank: Bank, tmp_path: Path) -> None:
    copy = tmp_path / "d.bank"
    shutil.copytree(bank.path, copy)
    view = open_bank(copy).rows_view(layer=1)
    shard = copy / "layers/1/patches/c.0.0.0"
    content = bytearray(shard.read_bytes())
    content[int(view._tokens._bytes._places.offset[2])] ^= 1
    shard.write_bytes(content)
    np.asarray(view[:2])
    with pytest.raises(BankCorrupt, match="row 2: the bytes do not match their checksum"):
        np.asarray(view)
