from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from audio_sets import write_clip_set, write_tone
from fake_bank import N_CLIPS, SETTINGS

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.growth import next_folder
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankError, BankMismatch
from patchbank.pipeline.extraction import Progress, extract, prepare
from patchbank.probing import BatchLoader

N_NEW = 7


def longer_table(table: Path, folder: Path, *, first: bool = False) -> Path:
    """A copy of a clip set with `N_NEW` more clips, before or after the others."""
    grown = shutil.copytree(table.parent, folder / "longer")
    with (grown / "clips.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    new = []
    for index in range(N_NEW):
        write_tone(grown / f"new/{index}.wav", hertz=500.0 + index, seed=100 + index)
        new.append([f"new/{index}.wav", "train"])
    with (grown / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *(new + rows if first else rows + new)])
    return grown / "clips.csv"


@pytest.fixture(scope="module")
def longer(clip_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return longer_table(clip_table, tmp_path_factory.mktemp("grown"))


@pytest.fixture(scope="module")
def grown(sealed: Bank, longer: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    path = shutil.copytree(sealed.path, tmp_path_factory.mktemp("banks") / "grown.bank")
    return extract(longer, encoder="fake", out=path, settings=SETTINGS)


def test_a_longer_table_adds_shards_and_touches_none(
    sealed: Bank, longer: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(sealed.path, tmp_path / "x.bank"))
    shards = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in path.glob("layers/*/p*/c.*")}
    steps: list[Progress] = []
    bank = extract(longer, encoder="fake", out=path, settings=SETTINGS, progress=steps.append)
    assert steps[0] == Progress(N_NEW, doing="starting")
    assert [step for step in steps if not step.doing][-1] == Progress(N_NEW, N_NEW, 0)
    assert steps[-1] == Progress(N_NEW, N_NEW, 0, doing="sealing")
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in shards} == shards
    assert len(list(path.glob("layers/1/patches/c.*"))) == 4
    assert (bank.n_clips, bank.n_rows) == (N_CLIPS + N_NEW, 48 + N_NEW)
    assert not (path / ".work").exists()
    assert not (path / "parts").exists()
    assert verify_bank(path) == ()


def test_a_grown_bank_holds_what_one_extraction_gives(
    grown: Bank, longer: Path, tmp_path: Path
) -> None:
    at_once = extract(longer, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
    assert grown.fingerprint == at_once.fingerprint
    assert grown.root_sha256 != at_once.root_sha256
    rows = grown.schema.clip_rows()
    for layer in (1, 2):
        for name in ("patches", "mean", "n_patches", *(["prefix"] if layer == 2 else [])):
            found = zarr.open_array(grown.path / f"layers/{layer}/{name}", mode="r")[:]
            expected = zarr.open_array(at_once.path / f"layers/{layer}/{name}", mode="r")[:]
            np.testing.assert_array_equal(found[rows], expected)


def test_the_slots_between_generations_are_holes(grown: Bank) -> None:
    holes = np.arange(N_CLIPS, 48)
    assert np.flatnonzero(grown.status == 3).tolist() == holes.tolist()
    clips = grown.clips.slice(N_CLIPS, 8).to_pylist()
    assert all(v is None for row in clips for k, v in row.items() if k != "status")
    assert (grown.n_patches(1)[holes] == -1).all()
    assert np.isnan(grown.pooled(1)[holes]).all()
    assert np.isnan(zarr.open_array(grown.path / "layers/1/patches", mode="r")[N_CLIPS]).all()
    assert (grown.places(1).offset[holes] == -1).all()


def test_an_epoch_over_a_grown_bank_leaves_the_holes_out(grown: Bank) -> None:
    for tier in ("ram", "map"):
        loader = BatchLoader(grown, layer=1, batch_size=16, tier=tier)  # type: ignore[arg-type]
        rows = [row for batch in loader for row in batch.rows.tolist()]
        assert sorted(rows) == grown.schema.clip_rows().tolist()


def test_new_clips_may_stand_anywhere_in_the_table(
    sealed: Bank, clip_table: Path, grown: Bank, tmp_path: Path
) -> None:
    table = longer_table(clip_table, tmp_path, first=True)
    path = Path(shutil.copytree(sealed.path, tmp_path / "x.bank"))
    bank = extract(table, encoder="fake", out=path, settings=SETTINGS)
    assert bank.root_sha256 == grown.root_sha256


def test_a_bank_grows_again(grown: Bank, longer: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(grown.path, tmp_path / "x.bank"))
    folder = Path(shutil.copytree(longer.parent, tmp_path / "set"))
    write_tone(folder / "last.wav", hertz=700.0)
    with (folder / "clips.csv").open("a") as file:
        file.write("last.wav,valid\n")
    bank = extract(folder / "clips.csv", encoder="fake", out=path, settings=SETTINGS)
    assert bank.schema.generations == (N_CLIPS, N_NEW, 1)
    assert bank.n_rows == 48 + 16 + 1
    assert bank.clips["clip_id"][64].as_py() == "last.wav"
    assert verify_bank(path) == ()


def test_the_same_table_in_another_order_adds_nothing(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(clip_table.parent, tmp_path / "set"))
    header, *rows = (folder / "clips.csv").read_text().splitlines()
    (folder / "clips.csv").write_text("\n".join([header, *reversed(rows)]) + "\n")
    plan = prepare(folder / "clips.csv", encoder="fake", out=sealed.path, settings=SETTINGS).plan
    assert plan.missing_shards == ()


def test_a_plan_counts_only_what_is_new(sealed: Bank, longer: Path) -> None:
    plan = prepare(longer, encoder="fake", out=sealed.path, settings=SETTINGS).plan
    assert plan.missing_shards == (3,)
    assert plan.missing_bytes < plan.total_bytes / 3
    assert not next_folder(sealed.path).exists()


def test_the_old_bank_stays_whole_until_the_new_one_is(
    sealed: Bank, longer: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(sealed.path, tmp_path / "x.bank"))
    seen = []

    def look(state: Progress) -> None:
        seen.append((state.doing, open_bank(path).fingerprint, verify_bank(path)))

    extract(longer, encoder="fake", out=path, settings=SETTINGS, progress=look)
    assert seen[0] == ("starting", sealed.fingerprint, ())
    assert seen[-1] == ("sealing", sealed.fingerprint, ())
    assert {one[1:] for one in seen} == {(sealed.fingerprint, ())}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            lambda text: text.replace("audio/0004.wav,train\n", ""),
            r"holds clips that the table lacks: 1, first audio/0004.wav; a bank only grows",
            id="a clip less",
        ),
        pytest.param(
            lambda text: text.replace("audio/0004.wav,train", "audio/0004.wav,test"),
            r"another split of clip audio/0004.wav(?s:.*)split: found 'train', expected 'test'",
            id="another split",
        ),
        pytest.param(
            lambda text: text.replace("path,split", "path,part"),
            r"other columns(?s:.*)columns: found \['split'\], expected \['part'\]",
            id="another column",
        ),
    ],
)
def test_a_table_that_takes_back_or_changes_is_refused(
    change: object, words: str, sealed: Bank, longer: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(longer.parent, tmp_path / "set"))
    text = (folder / "clips.csv").read_text()
    (folder / "clips.csv").write_text(change(text))  # type: ignore[operator]
    with pytest.raises(BankMismatch, match=words):
        extract(folder / "clips.csv", encoder="fake", out=sealed.path, settings=SETTINGS)


def test_a_growth_goes_on_only_with_the_table_that_it_was_begun_with(
    sealed: Bank, longer: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(sealed.path, tmp_path / "x.bank"))

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(longer, encoder="fake", out=path, settings=SETTINGS, progress=stop)
    assert open_bank(path).fingerprint == sealed.fingerprint
    other = Path(shutil.copytree(longer.parent, tmp_path / "set"))
    write_tone(other / "more.wav", hertz=900.0)
    with (other / "clips.csv").open("a") as file:
        file.write("more.wav,train\n")
    with pytest.raises(BankMismatch, match="is growing to 47 clips by another table; finish that"):
        extract(other / "clips.csv", encoder="fake", out=path, settings=SETTINGS)
    bank = extract(longer, encoder="fake", out=path, settings=SETTINGS)
    assert bank.n_clips == N_CLIPS + N_NEW


def test_a_column_keeps_the_type_that_the_bank_began_with(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_clip_set(tmp_path, n_clips=4)
    paths = [f"audio/{i:04d}.wav" for i in range(4)]
    pq.write_table(pa.table({"path": paths[:3], "year": [1, 2, 3]}), tmp_path / "a.parquet")
    out = tmp_path / "x.bank"
    extract(tmp_path / "a.parquet", encoder="fake", out=out, settings=SETTINGS)
    wide = pa.table({"path": paths, "year": [1.0, 2.0, 3.0, 4.5]})
    pq.write_table(wide, tmp_path / "b.parquet")
    with pytest.raises(BankMismatch, match="another type of column year"):
        extract(tmp_path / "b.parquet", encoder="fake", out=out, settings=SETTINGS)
    pq.write_table(wide.set_column(1, "year", [[1.0, 2.0, 3.0, 4.0]]), tmp_path / "c.parquet")
    bank = extract(tmp_path / "c.parquet", encoder="fake", out=out, settings=SETTINGS)
    assert [bank.clips["year"][row].as_py() for row in bank.schema.clip_rows()] == [1, 2, 3, 4]


def test_the_card_tells_the_generations(grown: Bank) -> None:
    document = json.loads((grown.path / "zarr.json").read_bytes())
    assert document["attributes"]["card"]["generations"] == [N_CLIPS, N_NEW]
    assert document["attributes"]["card"]["n_rows"] == grown.n_rows


def test_a_column_that_was_empty_takes_the_type_of_its_first_values(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_clip_set(tmp_path, n_clips=4)
    paths = [f"audio/{i:04d}.wav" for i in range(4)]
    empty = pa.table({"path": paths[:3], "note": pa.nulls(3), "x": [[float("nan")]] * 3})
    pq.write_table(empty, tmp_path / "a.parquet")
    out = tmp_path / "x.bank"
    extract(tmp_path / "a.parquet", encoder="fake", out=out, settings=SETTINGS)
    more = pa.table({"path": paths, "note": [None, None, None, "x"], "x": [[float("nan")]] * 4})
    pq.write_table(more, tmp_path / "b.parquet")
    bank = extract(tmp_path / "b.parquet", encoder="fake", out=out, settings=SETTINGS)
    rows = bank.schema.clip_rows().tolist()
    assert [bank.clips["note"][row].as_py() for row in rows] == [None, None, None, "x"]
    assert verify_bank(out) == ()


def test_a_bank_that_grew_while_it_was_open_is_not_called_damaged(
    sealed: Bank, longer: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(sealed.path, tmp_path / "x.bank"))
    held = open_bank(path)
    extract(longer, encoder="fake", out=path, settings=SETTINGS)
    for look in (lambda: held.clips, lambda: held.pooled(1)):
        with pytest.raises(BankError, match="has grown or was made anew since it was opened"):
            look()
    assert open_bank(path).clips.num_rows == 55


def test_show_tells_that_a_bank_is_growing(
    sealed: Bank, longer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from patchbank.cli.main import main

    path = Path(shutil.copytree(sealed.path, tmp_path / "x.bank"))

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(longer, encoder="fake", out=path, settings=SETTINGS, progress=stop)
    assert main(["bank", "show", str(path)]) == 0
    assert "growing to 47; the same extract command finishes that" in capsys.readouterr().out


def test_a_growth_into_too_many_files_is_refused_with_a_way_out(
    sealed: Bank, longer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchbank.pipeline import fitting

    monkeypatch.setattr(fitting, "MAX_FILES", 12)
    with pytest.raises(BankError, match=r"would grow to 16 files; .* bank merge --compact"):
        prepare(longer, encoder="fake", out=sealed.path, settings=SETTINGS)


def test_an_unfinished_conversion_is_not_taken_for_an_extraction(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    from patchbank.pipeline.rebuild import rebuild_bank

    def stop(n_done: int, n_shards: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "x.bank"
    with pytest.raises(KeyboardInterrupt):
        rebuild_bank([sealed], out, progress=stop)
    with pytest.raises(BankError, match="is an unfinished `patchbank bank merge` or `convert`"):
        extract(clip_table, encoder="fake", out=out, settings=SETTINGS)
