"""Banks that are opened at an address: the same batches, and nothing that the seal does not say."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bank_damage import INDEX_BYTES, ROW_BYTES, SHARD, STRIDE_BYTES, delete_inner_chunk, flip
from flaky_store import Behaviour, flaky
from loader_banks import make_bank, reader_threads
from share_processes import begin, kill, read_for_ever
from test_loader_processes import in_child

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.layout import crc32c
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankError,
    BankIncomplete,
    BankNotFound,
    StoreError,
)
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.pipeline.sharing.row_cache import cached_banks
from patchbank.probing import BatchLoader
from patchbank.probing.tiers import Tier

CHANGED = "has grown or was replaced since it was opened; open it again"
N_CLIPS = 40
__all__ = ["flaky"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATCHBANK_SETTINGS", str(tmp_path / "no-settings.toml"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("int8"), "int8")


def url(bank: Path) -> str:
    return f"file://{bank}"


def assert_same_batches(found: Bank, expected: Bank, *, n_epochs: int = 1, **more: object) -> None:
    """Every tensor of every batch, to the bit, in the same order."""
    loaders = [
        BatchLoader(found, layer=list(found.layers), batch_size=8, seed=3, **more),  # type: ignore[arg-type]
        BatchLoader(expected, layer=list(expected.layers), batch_size=8, seed=3, tier="read"),
    ]
    for _ in range(n_epochs):
        for one, other in zip(*loaders, strict=True):
            assert one.rows.tolist() == other.rows.tolist()
            for layer in expected.layers:
                for name in ("raw", "prefix", "n_patches"):
                    values = [getattr(batch[layer], name) for batch in (one, other)]
                    if values[1] is not None:
                        assert values[0].equal(values[1])
                assert one[layer].patches.equal(other[layer].patches)


def drop_shards(bank: Path) -> None:
    for path in bank.glob("layers/*/p*/c.*.0.0"):
        path.unlink()


@pytest.mark.parametrize("tier", ["auto", "ram", "read"])
def test_batches_are_those_of_the_bank_itself_and_a_second_pass_needs_no_store(
    sealed: Bank, copy: Path, tier: Tier
) -> None:
    assert_same_batches(open_bank(url(copy)), sealed, tier=tier)
    again = open_bank(url(copy))
    drop_shards(copy)
    assert_same_batches(again, sealed, n_epochs=2, tier=tier)


def test_quantised_tokens_too(int8: Bank) -> None:
    remote = open_bank(url(int8.path))
    assert_same_batches(remote, int8)
    assert remote.constants(1).sha256 == int8.constants(1).sha256
    np.testing.assert_array_equal(remote.scale(2), int8.scale(2))
    np.testing.assert_array_equal(np.asarray(remote.rows_view(1)), np.asarray(int8.rows_view(1)))


def test_everything_else_of_a_bank_is_the_same(sealed: Bank) -> None:
    remote = open_bank(url(sealed.path))
    assert (remote.fingerprint, remote.card) == (sealed.fingerprint, sealed.card)
    assert remote.clips.equals(sealed.clips)
    np.testing.assert_array_equal(remote.status, sealed.status)
    np.testing.assert_array_equal(remote.n_patches(1), sealed.n_patches(1))
    np.testing.assert_array_equal(remote.pooled(2, "max"), sealed.pooled(2, "max"))
    rows = [5, 39, 5, 0]
    view = remote.rows_view(2, rows)
    np.testing.assert_array_equal(np.asarray(view), np.asarray(sealed.rows_view(2, rows)))
    assert f"layer 2 of {sealed.path})" in repr(view)


def test_rows_that_are_not_asked_for_are_not_fetched(sealed: Bank, cache: Path) -> None:
    remote, rows = open_bank(url(sealed.path)), np.array([1, 2, 33])
    loader = BatchLoader(remote, layer=1, arrays=("patches",), rows=rows)
    assert sum(len(batch.rows) for batch in loader) == 3
    files = sorted(cache.glob("banks/*/layers/1/patches/c.*"))
    blocks = [path.stat().st_blocks * 512 // STRIDE_BYTES for path in files]
    assert blocks == [3, 1, 2]  # two rows and an index, an index, a row and an index
    assert not list(cache.glob("banks/*/layers/2"))


def test_the_choice_of_tier_says_where_tokens_come_from(sealed: Bank) -> None:
    remote = open_bank(url(sealed.path))
    afar = "from afar through the cache on this disk"
    said = str(BatchLoader(remote).choice)
    assert said.startswith("ram: 320 KiB fit into half of ")
    assert said.endswith(f"of free memory, {afar}")
    once = BatchLoader(remote, reads_once=True)
    assert str(once.choice) == f"read: 320 KiB are read once, {afar}"
    assert str(BatchLoader(remote, tier="read").choice) == f"read: as asked, {afar}"
    for tier in ("map", "direct"):
        with pytest.raises(BankError) as caught:
            BatchLoader(remote, tier=tier)  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"the tier {tier!r} reads files of this machine, and {sealed.path} is elsewhere; "
            f"choose ram or read, or pull it first: patchbank bank pull {sealed.path}"
        )


def test_banks_are_made_of_one_that_lies_elsewhere(sealed: Bank, tmp_path: Path) -> None:
    remote, rows = open_bank(url(sealed.path)), np.arange(3, 30)
    for number, more in enumerate(({"dtype": "int8"}, {"layers": [2], "rows": [rows]})):
        made = [
            rebuild_bank([bank], tmp_path / f"{number}{bank.is_remote}.bank", **more)  # type: ignore[arg-type]
            for bank in (remote, sealed)
        ]
        assert made[0].root_sha256 == made[1].root_sha256


def test_archives_are_read_but_not_trained_from(sealed: Bank, tmp_path: Path) -> None:
    rebuild_bank([sealed], tmp_path / "a.bank", storage="blosc")
    remote = open_bank(url(tmp_path / "a.bank"))
    for _ in range(2):
        found = np.asarray(remote.rows_view(1))
        np.testing.assert_array_equal(found, np.asarray(sealed.rows_view(1)))
        drop_shards(tmp_path / "a.bank")
        remote = pickle.loads(pickle.dumps(remote))
    with pytest.raises(BankError, match=r"a\.bank is an archive: its tokens are compressed"):
        BatchLoader(remote)


def test_a_wrong_byte_of_a_row_is_never_seen(copy: Path, sealed: Bank) -> None:
    flip(copy / SHARD, 3 * STRIDE_BYTES + 7)
    remote = open_bank(url(copy))
    clip = sealed.clips["clip_id"][19].as_py()
    with pytest.raises(BankCorrupt) as caught:
        list(BatchLoader(remote, layer=1))
    assert str(caught.value) == (
        f"{copy}: shard {SHARD}, row 19 ({clip}): the bytes do not match the row's SHA-256; it may "
        "be in the middle of a push; else who has the bank mends it: `patchbank bank push BANK "
        f"{copy} --repair`"
    )
    with pytest.raises(BankCorrupt, match="row 19"):
        remote.rows_view(1, [18, 19])[...]
    others = [row for row in range(N_CLIPS) if row != 19]
    found = np.asarray(remote.rows_view(1, others))
    np.testing.assert_array_equal(found, np.asarray(sealed.rows_view(1, others)))
    shutil.copy(sealed.path / SHARD, copy / SHARD)
    np.testing.assert_array_equal(remote.rows_view(1)[19], sealed.rows_view(1)[19])


def with_index(path: Path, entries: dict[int, tuple[int, int]]) -> None:
    """Writes other offsets and lengths, with the right checksum."""
    content = bytearray(path.read_bytes())
    start = len(content) - INDEX_BYTES
    for slot, entry in entries.items():
        content[start + 16 * slot : start + 16 * slot + 16] = b"".join(
            value.to_bytes(8, "little") for value in entry
        )
    content[-4:] = crc32c(bytes(content[start:-4])).to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda path: with_index(path, {0: (STRIDE_BYTES, ROW_BYTES), 1: (0, ROW_BYTES)}),
            r"shard layers/1/patches/c\.1\.0\.0, row 1[67] \(.*the bytes do not match the row's",
        ),
        (
            lambda path: with_index(path, {2: (2**40, ROW_BYTES)}),
            "row 2: the index points to 320 bytes at 1099511627776",
        ),
        (
            lambda path: with_index(path, {2: (8_192, 2**40)}),
            "row 2: the index points to 1099511627776 bytes at 8192",
        ),
        (lambda path: flip(path, -INDEX_BYTES), "the index does not match its crc32c"),
        (lambda path: delete_inner_chunk(path, slot=5), "row 21 is missing"),
    ],
    ids=["swapped rows", "outside", "huge", "checksum", "missing"],
)
def test_an_index_that_lies_gives_no_row(
    copy: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(copy / SHARD)
    remote = open_bank(url(copy))
    with pytest.raises(BankCorrupt, match=said) as caught:
        list(BatchLoader(remote, layer=1, shuffle=False))
    assert str(caught.value).startswith(f"{copy}: shard")
    assert "/cache/" not in str(caught.value)
    assert "--repair" in str(caught.value)


def test_rows_that_stand_in_another_order_are_found_by_their_index(
    copy: Path, sealed: Bank
) -> None:
    content = bytearray((copy / SHARD).read_bytes())
    rows = [content[n * STRIDE_BYTES : (n + 1) * STRIDE_BYTES] for n in range(2)]
    content[: 2 * STRIDE_BYTES] = rows[1] + rows[0]
    (copy / SHARD).write_bytes(content)
    with_index(copy / SHARD, {0: (STRIDE_BYTES, ROW_BYTES), 1: (0, ROW_BYTES)})
    assert_same_batches(open_bank(url(copy)), sealed)


def test_a_file_that_is_cut_or_gone_is_told_when_it_is_opened(copy: Path) -> None:
    os.truncate(copy / SHARD, 9_000)
    with pytest.raises(BankCorrupt, match=r"c\.1\.0\.0 has 9000 bytes, sealed .*--repair"):
        open_bank(url(copy))
    (copy / SHARD).unlink()
    with pytest.raises(BankCorrupt, match=r"c\.1\.0\.0 is missing, sealed .*--repair"):
        open_bank(url(copy))


def test_a_file_that_is_cut_or_gone_later_is_told_when_it_is_read(copy: Path) -> None:
    remote = open_bank(url(copy))
    os.truncate(copy / SHARD, 9_000)
    with pytest.raises(BankCorrupt, match=r"c\.1\.0\.0 has 9000 bytes, sealed .*--repair"):
        BatchLoader(remote, layer=1)
    (copy / SHARD).unlink()
    with pytest.raises(BankCorrupt, match=r"c\.1\.0\.0 is gone; .*--repair"):
        BatchLoader(remote, layer=1)
    os.truncate(copy / "layers/1/mean/c.0.0", 9)
    with pytest.raises(BankCorrupt, match=r"layers/1/mean/c\.0\.0 has 9 bytes, sealed"):
        remote.pooled(1)


def test_small_files_have_their_sealed_bytes_or_are_refused(copy: Path, cache: Path) -> None:
    for name in ("clips.parquet", "layers/1/mean/c.0.0", "layers/2/n_patches/c.0"):
        flip(copy / name, 40)
    remote = open_bank(url(copy))
    for read in (
        lambda: remote.clips,
        lambda: remote.status,
        lambda: remote.pooled(1),
        lambda: remote.n_patches(2),
    ):
        with pytest.raises(BankCorrupt, match="does not have the sealed SHA-256; it may be in the"):
            read()
    assert [path for path in cache.rglob("*") if path.is_file() and path.name != "url"] == []


def test_a_bank_that_was_replaced_is_not_called_damaged(
    copy: Path, int8: Bank, sealed: Bank, cache: Path
) -> None:
    remote = open_bank(url(copy))
    rows = remote.rows_view(1, np.arange(3))
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(sealed.rows_view(1, np.arange(3))))
    shutil.rmtree(copy)
    shutil.copytree(int8.path, copy)
    for read in (
        lambda: remote.pooled(1),
        lambda: np.asarray(remote.rows_view(1)),
        lambda: list(BatchLoader(remote)),
    ):
        with pytest.raises(BankError, match=CHANGED) as caught:
            read()
        assert not isinstance(caught.value, BankCorrupt)
    assert_same_batches(open_bank(url(copy)), int8)
    assert len(cached_banks(cache)) == 2


def test_what_is_no_sealed_bank_is_named_as_such(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BankNotFound, match=f"no bank at {tmp_path}/nothing: there is no seal"):
        open_bank(url(tmp_path / "nothing"))
    (copy / "seal.json").unlink()
    with pytest.raises(BankIncomplete, match=f"{copy} has no seal.json: its push has not finished"):
        open_bank(url(copy))


def test_a_layer_that_is_not_there_is_named_with_the_address(sealed: Bank) -> None:
    with pytest.raises(BankError, match=f"{sealed.path} has no layer 9; it has"):
        open_bank(url(sealed.path)).array(9)


def test_a_bank_and_its_copy_elsewhere_are_one(sealed: Bank, tmp_path: Path) -> None:
    with pytest.raises(BankError, match=f"{sealed.path} is named twice"):
        rebuild_bank([sealed, open_bank(url(sealed.path))], tmp_path / "twice.bank")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "noise": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize(
    "damage",
    ["noise", "cut", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zeros", "empty"))],
)
def test_a_damaged_cache_gives_no_wrong_token(sealed: Bank, cache: Path, damage: str) -> None:
    assert_same_batches(open_bank(url(sealed.path)), sealed)
    files = [path for path in cache.glob("banks/*/*/**/*") if path.is_file()]
    assert len(files) == 11
    for path in [*files, *cache.glob("banks/*/clips.parquet")]:
        DAMAGES[damage](path)
    assert_same_batches(open_bank(url(sealed.path)), sealed, n_epochs=2)


def test_a_cache_smaller_than_an_epoch_stays_within_its_limit(
    sealed: Bank, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHBANK_CACHE_LIMIT", "250000")
    remote = open_bank(url(sealed.path))
    assert_same_batches(remote, sealed, n_epochs=3, tier="read")
    [bank] = cached_banks(cache)
    assert 50_000 < bank.bytes <= 250_000


def test_a_cache_that_cannot_be_written_is_no_failure(
    sealed: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "file"))
    remote = open_bank(url(sealed.path))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert_same_batches(remote, sealed, n_epochs=2, tier="read")
        np.testing.assert_array_equal(remote.pooled(1), sealed.pooled(1))
    said = sorted(str(warning.message) for warning in warned)
    assert len(said) == 2
    assert f"{tmp_path}/file cannot be written (Not a directory): small files go to" in said[0]
    assert f"rows are not kept in {tmp_path}/file (Not a directory)" in said[1]


@pytest.mark.parametrize("tier", ["read", pytest.param("ram", marks=pytest.mark.slow)])
def test_threads_and_processes_share_a_bank_that_lies_elsewhere(sealed: Bank, tier: Tier) -> None:
    remote = open_bank(url(sealed.path))
    errors: list[str] = []

    def check() -> None:
        try:
            assert_same_batches(remote, sealed, n_epochs=2, tier=tier)
        except BaseException:
            errors.append(traceback.format_exc())

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_and_a_pickled_copy_go_on_where_the_parent_has_read(
    sealed: Bank, copy: Path
) -> None:
    remote = open_bank(url(copy))
    loader = BatchLoader(remote, layer=1, tier="read")
    next(iter(loader))
    in_child(lambda: assert_same_batches(remote, sealed, tier="read"))
    again = pickle.loads(pickle.dumps(loader))
    expected = [batch.patches.clone() for batch in BatchLoader(sealed, layer=1, tier="read")]
    again.epoch = 0
    for batch, patches in zip(again, expected, strict=True):
        assert batch.patches.equal(patches)


def test_killed_at_any_moment_two_processes_leave_a_sound_cache(
    sealed: Bank, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHBANK_CACHE_LIMIT", "400000")
    chance = random.Random(5)
    for _ in range(5):
        readers = [begin(read_for_ever, url(sealed.path), cache, "400000") for _ in range(2)]
        time.sleep(chance.uniform(0.05, 0.3))
        assert [reader.is_alive() for reader in readers] == [True, True]
        for reader in readers:
            kill(reader)
    assert_same_batches(open_bank(url(sealed.path)), sealed, n_epochs=2)
    [bank] = cached_banks(cache)
    assert bank.bytes <= 400_000


def test_a_request_that_fails_and_bytes_that_are_wrong_once_are_asked_for_again(
    sealed: Bank, flaky: Behaviour, cache: Path
) -> None:
    for name in ("fails_first", "lies_first"):
        setattr(flaky, name, True)
        assert_same_batches(open_bank(f"flaky://{sealed.path}"), sealed)
        setattr(flaky, name, False)
        times = Counter(asked for asked in flaky.asked if asked[0].startswith("layers"))
        # A row that shares its request with others is asked for alone the second time.
        assert max(times.values()) == 2
        assert len(times) >= 2 * N_CLIPS
        flaky.asked.clear()
        shutil.rmtree(cache)


def test_neighbours_share_a_request_and_requests_do_not_wait_for_each_other(
    sealed: Bank, flaky: Behaviour
) -> None:
    remote = open_bank(f"flaky://{sealed.path}")
    loader = BatchLoader(remote, layer=1, arrays=("patches",), shuffle=False, batch_size=N_CLIPS)
    flaky.asked.clear()
    list(loader)
    n_bytes = {name: stop - start for name, start, stop in flaky.asked}
    assert len(flaky.asked) == len(n_bytes) == 3  # a shard each
    assert max(n_bytes.values()) == 15 * STRIDE_BYTES + ROW_BYTES
    flaky.latency_s, flaky.most_at_once = 0.02, 0
    [*BatchLoader(remote, layer=2, batch_size=4)]
    assert 8 <= flaky.most_at_once <= 32
    rows = np.random.default_rng(0).permutation(N_CLIPS)
    again = open_bank(f"flaky://{sealed.path}")
    flaky.most_at_once, flaky.asked = 0, []
    np.testing.assert_array_equal(
        np.asarray(again.rows_view(1, rows)), np.asarray(sealed.rows_view(1, rows))
    )
    assert flaky.asked == []  # all in the cache


def test_a_store_that_is_gone_is_an_error_that_a_retry_may_help(
    sealed: Bank, flaky: Behaviour
) -> None:
    remote = open_bank(f"flaky://{sealed.path}")
    loader = BatchLoader(remote, layer=1, batch_size=4, tier="read")
    flaky.answers = len(flaky.asked) + 6
    n_seen = 0

    def read() -> None:
        nonlocal n_seen
        for _batch in loader:
            n_seen += 4

    with pytest.raises(StoreError, match=f"flaky://{sealed.path} does not answer") as caught:
        read()
    assert caught.value.may_pass
    assert n_seen < N_CLIPS
    assert not reader_threads()
    flaky.answers = 10**9
    assert_same_batches(remote, sealed)
