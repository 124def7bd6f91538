"""Banks with made views that grow, join and change, and that come from others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from audio_sets import write_clip_set, write_tone
from made_views import EVERYTHING, MADE, N_ROWS, by_key, waveform_of
from test_format_page import reseal

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.join import join_banks
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.errors import BankCorrupt, BankMismatch
from patchbank.pipeline.extraction import Progress, extract, prepare
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.pipeline.specs import AugmentSpec, GainSpec, MixupSpec, ShiftSpec


def longer(table: Path, folder: Path, *, n_new: int = 9) -> Path:
    """A copy of a clip set with more training clips."""
    place = Path(shutil.copytree(table.parent, folder / "longer"))
    with (place / "clips.csv").open("a") as file:
        for index in range(n_new):
            write_tone(place / f"new/{index}.wav", hertz=500.0 + index, seed=100 + index)
            file.write(f"new/{index}.wav,train\n")
    return place / "clips.csv"


def test_a_bank_grows_and_keeps_the_draws_of_its_rows(
    made: Bank, clip_table: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(made.path, tmp_path / "x.bank"))
    before = by_key(made.clips)
    shards = {p: p.stat().st_mtime_ns for p in path.glob("layers/*/p*/c.*")}
    table = longer(clip_table, tmp_path)
    steps: list[Progress] = []
    bank = extract(table, encoder="fake", out=path, settings=MADE, progress=steps.append)
    assert steps[-1] == Progress(27, 27, 0, doing="sealing")
    assert {p: p.stat().st_mtime_ns for p in shards} == shards
    after = by_key(bank.clips)
    assert {key: after[key] for key in before} == before
    fresh = [row for key, row in after.items() if key not in before]
    assert len(fresh) == 27
    mixed = {name for row in fresh for name in row["mix_sources"]}
    assert {name.split("/")[0] for name in mixed} == {"audio", "new"}
    waveforms = np.stack([waveform_of(row, after, table.parent) for row in fresh])
    encoder = load_encoder("fake")
    expected = encoder.encode(encoder.frontend(torch.from_numpy(waveforms)))[1].patches.numpy()
    found = zarr.open_array(path / "layers/1/patches", mode="r")[-27:]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert verify_bank(path) == ()
    assert prepare(table, encoder="fake", out=path, settings=MADE).plan.missing_shards == ()
    # Drawn at once, old clips would be mixed with new ones too: other audio, another fingerprint.
    at_once = extract(table, encoder="fake", out=tmp_path / "o.bank", settings=MADE)
    assert at_once.recipe_id == bank.recipe_id
    assert at_once.fingerprint != bank.fingerprint


def test_a_growth_that_was_cut_short_goes_on_with_its_draws(
    made: Bank, clip_table: Path, tmp_path: Path
) -> None:
    table = longer(clip_table, tmp_path, n_new=20)
    paths = [Path(shutil.copytree(made.path, tmp_path / f"{name}.bank")) for name in "xy"]

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(table, encoder="fake", out=paths[0], settings=MADE, progress=stop)
    seals = []
    for path in paths:
        extract(table, encoder="fake", out=path, settings=MADE)
        seals.append((path / "seal.json").read_bytes())
    assert seals[0] == seals[1]


def test_more_views_are_a_growth_and_fewer_are_refused(
    made: Bank, clip_table: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(made.path, tmp_path / "x.bank"))
    more = replace(MADE, n_views=3)
    steps: list[Progress] = []
    bank = extract(clip_table, encoder="fake", out=path, settings=more, progress=steps.append)
    assert steps[-1] == Progress(20, 20, 0, doing="sealing")
    at_once = extract(clip_table, encoder="fake", out=tmp_path / "o.bank", settings=more)
    columns = ["mix_sources", "mix_snr_db", "mix_gains", "shift_samples", "gain_db"]
    expected = by_key(at_once.clips)
    for key, row in by_key(bank.clips).items():
        assert [row[name] for name in columns] == [expected[key][name] for name in columns]
    with pytest.raises(
        BankMismatch, match=r"more views .* say --views 3(?s:.*)views: found 3, exp"
    ):
        extract(clip_table, encoder="fake", out=path, settings=MADE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param(
            replace(MADE, augment=replace(EVERYTHING, seed=5)),
            "augment.seed: found 0, expected 5",
            id="seed",
        ),
        pytest.param(
            replace(MADE, augment=AugmentSpec(MixupSpec(p=0.5), ShiftSpec(), GainSpec())),
            "augment.mixup.p: found 0.9, expected 0.5",
            id="p",
        ),
        pytest.param(
            replace(MADE, n_views=0, augment=None),
            "; its views are those of --views 2 --augment mixup --augment shift --augment gain, or "
            "choose another --out\n  augment: found '--augment mixup .*', expected None$",
            id="none",
        ),
        pytest.param(
            replace(MADE, augment=AugmentSpec(shift=ShiftSpec(0.5), seed=3)),
            "augment: found '--augment mixup --augment shift --augment gain', expected '--augment "
            "shift:max_s=0.5 --augment-seed 3'$",
            id="others",
        ),
    ],
)
def test_other_views_are_another_recipe(
    settings: Any, words: str, made: Bank, clip_table: Path
) -> None:
    with pytest.raises(
        BankMismatch, match=f"holds other tokens than this command makes(?s:.*?){words}"
    ):
        extract(clip_table, encoder="fake", out=made.path, settings=settings)


def test_what_to_type_is_said_of_unfinished_banks_and_of_those_without_views(
    made: Bank, sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(made.path, tmp_path / "x.bank"))
    (path / "seal.json").unlink()
    other = replace(MADE, augment=AugmentSpec(MixupSpec()))
    with pytest.raises(BankMismatch, match="are those of --views N --augment mixup --augment sh"):
        extract(clip_table, encoder="fake", out=path, settings=other)
    plain = replace(MADE, stored_dtype="float16")
    with pytest.raises(BankMismatch, match="it makes no views: leave --views and --augment out"):
        extract(clip_table, encoder="fake", out=sealed.path, settings=plain)


def test_banks_with_views_merge_and_convert(made: Bank, tmp_path: Path) -> None:
    other_table = write_clip_set(tmp_path / "other", n_clips=12)
    lines = other_table.read_text().splitlines()
    named = [lines[0] + ",clip_id", *(f"{line},o{n}" for n, line in enumerate(lines[1:]))]
    other_table.write_text("\n".join(named) + "\n")
    other = extract(other_table, encoder="fake", out=tmp_path / "o.bank", settings=MADE)
    expected = by_key(made.clips) | by_key(other.clips)
    linked = join_banks([made, other], tmp_path / "l.bank")
    copied = rebuild_bank([made, other], tmp_path / "c.bank")
    archive = rebuild_bank([copied], tmp_path / "a.bank", storage="blosc")
    narrow = rebuild_bank([linked], tmp_path / "n.bank", dtype="int8", layers=[2])
    columns = ["audio_sha256", "mix_sources", "mix_snr_db", "mix_gains", "shift_samples", "gain_db"]
    for bank in (linked, copied, archive, narrow):
        assert verify_bank(bank.path) == ()
        assert bank.card["augment"] == EVERYTHING.identity()
        found = by_key(bank.clips)
        assert found.keys() == expected.keys()
        for key, row in found.items():
            assert [row[name] for name in columns] == [expected[key][name] for name in columns]
    assert linked.recipe_id == copied.recipe_id == archive.recipe_id == made.recipe_id


def test_a_bank_without_views_is_not_merged_with_one(
    made: Bank, clip_table: Path, tmp_path: Path
) -> None:
    plain = replace(MADE, n_views=0, augment=None)
    bank = extract(clip_table, encoder="fake", out=tmp_path / "p.bank", settings=plain)
    with pytest.raises(BankMismatch, match="only banks of one recipe can be merged") as error:
        join_banks([made, bank], tmp_path / "m.bank")
    options = "--augment mixup --augment shift --augment gain"
    assert error.value.differences == {"augment": (None, options)}


def test_the_training_part_of_a_bank_keeps_its_views(
    made: Bank, clip_table: Path, tmp_path: Path
) -> None:
    line = [
        "bank",
        "convert",
        str(made.path),
        "--split",
        "train",
        "--out",
        str(tmp_path / "t.bank"),
    ]
    assert main(line) == 0
    part = open_bank(tmp_path / "t.bank")
    assert (part.n_clips, part.recipe_id) == (60, made.recipe_id)
    table = tmp_path / "train.csv"
    names = [row["path"] for row in part.clips.to_pylist() if not row["view"]]
    table.write_text("path,split\n" + "".join(f"{name},train\n" for name in names))
    again = prepare(
        table, encoder="fake", out=part.path, audio_root=clip_table.parent, settings=MADE
    )
    assert again.plan.missing_shards == ()


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("mix_gains", None, "no column mix_gains"),
        ("mix_gains", pa.array(["x"] * N_ROWS), "mix_gains is string, expected list"),
        ("shift_samples", pa.array([1.5] * N_ROWS), "shift_samples is double, expected int32"),
        ("gain_db", pa.array([None] * N_ROWS, pa.float64()), "gain_db is null in clips"),
        ("mix_snr_db", pa.array([[None]] * N_ROWS, pa.list_(pa.float64())), "mix_snr_db is null"),
    ],
)
def test_a_bank_whose_view_columns_are_others_is_refused(
    name: str, column: pa.Array | None, words: str, made: Bank, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(made.path, tmp_path / "x.bank"))
    clips = pq.read_table(path / "clips.parquet")
    place = clips.column_names.index(name)
    clips = clips.remove_column(place)
    clips = clips if column is None else clips.add_column(place, name, column)
    pq.write_table(clips, path / "clips.parquet")
    reseal(path)
    with pytest.raises(BankCorrupt, match=words):
        _ = open_bank(path).clips


@pytest.mark.parametrize(
    "augment",
    [
        pytest.param([], id="a list"),
        pytest.param({"seed": 0}, id="nothing"),
        pytest.param({"seed": "0", "gain": {}}, id="a seed of text"),
        pytest.param({"seed": 0, "mixup": {"p": 7}}, id="a probability"),
        pytest.param({"seed": 0, "mixup": {"q": 1}}, id="an unknown parameter"),
        pytest.param({"seed": 0, "noise": {}}, id="an unknown augmentation"),
        pytest.param({"seed": 0, "gain": {"min_db": -6.0}}, id="a default that is not written"),
        pytest.param({"seed": 0, "gain": {"min_db": -6, "max_db": 6.0}}, id="an int for a float"),
        pytest.param({"gain": {"min_db": -6.0, "max_db": 6.0}}, id="no seed"),
        pytest.param({"seed": 0, "gain": GainSpec().__dict__, "shift": None}, id="a null"),
    ],
)
def test_a_card_whose_views_make_no_sense_is_refused(
    augment: Any, made: Bank, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(made.path, tmp_path / "x.bank"))
    document = json.loads((path / "zarr.json").read_bytes())
    document["attributes"]["card"]["augment"] = augment
    (path / "zarr.json").write_text(json.dumps(document))
    reseal(path)
    with pytest.raises(BankCorrupt):
        open_bank(path)
