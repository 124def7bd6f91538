"""Views: several variants of a clip, from the table through the bank to training."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from audio_sets import write_tone
from fake_bank import SETTINGS
from format_reader import FormatReader

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.extraction import extract
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.probing import BatchLoader
from patchbank.probing.run import run_training
from patchbank.probing.settings import SearchSettings, TrainSettings


def with_views(table: Path, folder: Path) -> Path:
    """A copy of a clip set; each training clip has a view 1, mixed with the next training clip."""
    place = Path(shutil.copytree(table.parent, folder / "set"))
    with (place / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    train = [row["path"] for row in rows if row["split"] == "train"]
    table_rows = [[row["path"], row["path"], 0, row["split"], ""] for row in rows]
    for index, path in enumerate(train):
        other = train[(index + 1) % len(train)]
        write_tone(place / f"views/{index}.wav", hertz=300.0 + index, seed=index)
        table_rows.append([path, f"views/{index}.wav", 1, "train", other])
    with (place / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip_id", "path", "view", "split", "mix_sources"])
        writer.writerows(table_rows)
    return place / "clips.csv"


@pytest.fixture(scope="module")
def viewed(clip_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("views")
    table = with_views(clip_table, folder)
    return extract(table, encoder="fake", out=folder / "v.bank", settings=SETTINGS)


def test_a_bank_keeps_views_and_what_is_mixed_into_them(viewed: Bank) -> None:
    clips = viewed.clips
    assert clips["view"].to_pylist() == [0] * 40 + [1] * 20
    assert clips["clip_id"][40].as_py() == "audio/0000.wav"
    assert clips["path"][40].as_py() == "views/0.wav"
    assert clips["mix_sources"][40].as_py() == ["audio/0001.wav"]
    assert clips["mix_sources"][0].as_py() == []
    assert verify_bank(viewed.path) == ()
    assert FormatReader(viewed.path).clips.to_pylist() == clips.to_pylist()


def test_training_uses_views_and_tests_on_clean_clips(viewed: Bank, tmp_path: Path) -> None:
    results = run_training(
        viewed,
        viewed.path.parent / "set/labels.csv",
        tmp_path / "run",
        probes=["linear"],
        settings=TrainSettings(n_epochs=2, n_seeds=1, search=SearchSettings(n_candidates=1)),
        task="multilabel",
    )
    (fold,) = results["folds"]
    assert (fold["train"], fold["valid"], fold["test"]) == (40, 10, 10)


def test_views_survive_growth_and_conversion(viewed: Bank, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(viewed.path.parent / "set", tmp_path / "set"))
    write_tone(folder / "views/more.wav", hertz=440.0)
    with (folder / "clips.csv").open("a") as file:
        file.write("audio/0000.wav,views/more.wav,2,train,audio/0001.wav;audio/0004.wav\n")
    path = Path(shutil.copytree(viewed.path, tmp_path / "g.bank"))
    grown = extract(folder / "clips.csv", encoder="fake", out=path, settings=SETTINGS)
    last = grown.clips.slice(grown.n_rows - 1).to_pylist()[0]
    assert (last["clip_id"], last["view"]) == ("audio/0000.wav", 2)
    assert last["mix_sources"] == ["audio/0001.wav", "audio/0004.wav"]
    made = rebuild_bank([grown], tmp_path / "c.bank", dtype="int8")
    assert made.clips["mix_sources"].to_pylist()[-1] == last["mix_sources"]
    assert open_bank(made.path).n_clips == 61
    seen = [row for batch in BatchLoader(made, layer=1) for row in batch.rows.tolist()]
    assert sorted(seen) == list(np.arange(61))
