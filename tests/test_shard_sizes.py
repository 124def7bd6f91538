"""How many rows a shard has is what a bank was begun with, whatever is chosen today."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_bank import SETTINGS

from patchbank.pipeline import plan
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.extraction import extract
from patchbank.pipeline.progress import Progress
from patchbank.pipeline.rebuild import rebuild_bank


class Stopped(Exception):
    pass


def stop(n_done: int, n_shards: int) -> None:
    raise Stopped


def stop_midway(progress: Progress) -> None:
    if progress.n_done:
        raise Stopped


def test_a_bank_of_other_shards_is_finished_and_grows(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = clip_table.read_text().splitlines(keepends=True)
    short = tmp_path / "short.csv"
    short.write_text("".join(lines[:21]))
    out = tmp_path / "x.bank"
    extract_to = {"encoder": "fake", "out": out, "settings": SETTINGS}
    extract_to["audio_root"] = clip_table.parent
    with monkeypatch.context() as older:
        older.setattr(plan, "rows_per_shard", lambda **_: 9)
        with pytest.raises(Stopped):
            extract(short, **extract_to, progress=stop_midway)
    assert (out / "commits" / "00000.json").is_file()
    assert not (out / "seal.json").exists()
    extract(short, **extract_to)
    assert extract(short, **extract_to).schema.rows_per_shard == 9
    grown = extract(clip_table, **extract_to)
    assert grown.schema.rows_per_shard == 9
    assert grown.schema.generations == (20, 20)


def test_a_conversion_to_other_shards_is_finished(
    sealed: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "y.bank"
    with monkeypatch.context() as older:
        older.setattr(plan, "rows_per_shard", lambda **_: 9)
        with pytest.raises(Stopped):
            rebuild_bank([sealed], out, dtype="int8", progress=stop)
    rebuild_bank([sealed], out, dtype="int8")
    assert open_bank(out).schema.rows_per_shard == 9
    rebuild_bank([sealed], out, dtype="int8")
