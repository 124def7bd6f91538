"""Banks of pooled vectors: what is left of a bank without its tokens."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from bank_damage import flip
from fake_bank import SETTINGS

from patchbank.cli.main import main
from patchbank.cli.predictor import Predictor
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.join import join_banks
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankCorrupt, BankError, BankMismatch, PatchbankError, TrialError
from patchbank.pipeline.extraction import extract
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.pipeline.selection import make_selection, select
from patchbank.probing import BatchLoader
from patchbank.probing.run import run_training
from patchbank.probing.settings import TrainSettings

QUICK = TrainSettings(n_epochs=3, n_seeds=1, learning_rates={"": (1e-2,)}, weight_decays={"": (0.0,)})
SMALL = {"mean", "max", "min", "n_patches"}


def pooled(bank: Bank, out: Path, **options: Any) -> Bank:
    chosen = select(bank, pooled_only=True, **options)
    return make_selection(bank, out, chosen, progress=lambda done, total: None)


@pytest.fixture(scope="module")
def thin(sealed: Bank, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return pooled(sealed, tmp_path_factory.mktemp("thin") / "thin.bank")


def test_the_bank_keeps_all_but_tokens(thin: Bank, sealed: Bank) -> None:
    assert (thin.encoder_id, thin.recipe_id) == (sealed.encoder_id, sealed.recipe_id)
    assert thin.fingerprint == sealed.fingerprint
    assert thin.card["storage"] == "pooled"
    assert thin.clips.equals(sealed.clips)
    for layer in sealed.layers:
        for pool in ("mean", "max", "min"):
            np.testing.assert_array_equal(thin.pooled(layer, pool), sealed.pooled(layer, pool))
        np.testing.assert_array_equal(thin.n_patches(layer), sealed.n_patches(layer))
        assert {path.name for path in (thin.path / f"layers/{layer}").iterdir()} == SMALL | {
            "zarr.json"
        }
    assert {path.name for path in (thin.path / "golden").iterdir()} == {
        "zarr.json",
        "frames",
        "waveform",
    }
    assert verify_bank(thin.path) == verify_bank(thin.path, quick=True) == ()


def test_other_readers_open_it(thin: Bank, sealed: Bank) -> None:
    data = xr.open_zarr(thin.path, group="layers/1", consolidated=False)
    np.testing.assert_array_equal(data["mean"], sealed.pooled(1))
    assert set(data) == SMALL
    assert set(zarr.open_group(thin.path, mode="r")["layers/1"].array_keys()) == SMALL


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_pooled_vectors_of_codes_are_floats(dtype: str, sealed: Bank, tmp_path: Path) -> None:
    codes = rebuild_bank([sealed], tmp_path / "codes.bank", dtype=dtype)  # type: ignore[arg-type]
    found = pooled(codes, tmp_path / "thin.bank")
    np.testing.assert_array_equal(found.pooled(2), codes.pooled(2))
    assert {path.name for path in (found.path / "layers/2").iterdir()} == SMALL | {"zarr.json"}
    assert verify_bank(found.path) == ()
    with pytest.raises(BankError, match="holds pooled vectors only"):
        found.constants(2)
    with pytest.raises(PatchbankError, match="--dtype float16 is for tokens"):
        select(found, dtype="float16")


def test_whoever_asks_for_tokens_is_told(thin: Bank) -> None:
    words = r"holds pooled vectors only .* `patchbank bank pull` .* without --pooled-only"
    for ask in (
        lambda: thin.array(1),
        lambda: thin.places(1),
        lambda: thin.rows_view().shape,
        lambda: BatchLoader(thin),
        lambda: rebuild_bank([thin], thin.path.with_name("x.bank")),
    ):
        with pytest.raises(BankError, match=words):
            ask()
    [batch] = BatchLoader(thin, layer=1, arrays=("mean", "max"), batch_size=40, shuffle=False)
    np.testing.assert_array_equal(batch.pooled["max"], thin.pooled(1, "max"))


def test_fewer_clips_and_layers_of_it_are_those_of_the_whole_bank(
    thin: Bank, sealed: Bank, tmp_path: Path
) -> None:
    for options in ({"layers": (2,)}, {"layers": (2,), "splits": ["train"]}):
        name = f"{len(options)}.bank"
        chosen = select(thin, **options)  # type: ignore[arg-type]
        again = make_selection(thin, tmp_path / f"b{name}", chosen, progress=lambda *_: None)
        direct = pooled(sealed, tmp_path / name, **options)
        assert again.clips.equals(direct.clips)
        assert again.fingerprint == direct.fingerprint
        np.testing.assert_array_equal(again.pooled(2, "min"), direct.pooled(2, "min"))
        assert again.layers == (2,)
        assert not again.schema.holds_tokens
        assert verify_bank(again.path) == ()


def test_two_of_them_join_and_one_joins_no_tokens(
    thin: Bank, sealed: Bank, tmp_path: Path
) -> None:
    parts = [
        rebuild_bank([sealed], tmp_path / f"{n}.bank", rows=[rows], storage="pooled")
        for n, rows in enumerate((np.arange(20), np.arange(20, 40)))
    ]
    whole = join_banks(parts, tmp_path / "joined.bank")
    assert whole.fingerprint == sealed.fingerprint
    done = whole.schema.clip_rows()
    np.testing.assert_array_equal(whole.pooled(1)[done], sealed.pooled(1))
    assert verify_bank(whole.path) == ()
    rest = rebuild_bank([sealed], tmp_path / "rest.bank", rows=[np.arange(20, 40)])
    with pytest.raises(BankMismatch, match=r"pooled vectors .*convert --pooled-only"):
        join_banks([parts[0], rest], tmp_path / "x.bank")


def test_it_does_not_grow(thin: Bank, clip_table: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip_table.parent, tmp_path / "set"))
    shutil.copy(folder / "audio/0000.wav", folder / "more.wav")
    with (folder / clip_table.name).open("a") as file:
        file.write("more.wav,train\n")
    with pytest.raises(BankError, match=r"does not grow; .*bank convert --pooled-only"):
        extract(folder / clip_table.name, encoder="fake", out=thin.path, settings=SETTINGS)


def test_damage_is_found(thin: Bank, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(thin.path, tmp_path / "damaged.bank"))
    flip(damaged / "layers/1/mean/c.0.0", 9)
    (problem,) = verify_bank(damaged)
    assert problem.startswith("layers/1/mean/c.0.0: SHA-256 is")
    (damaged / "layers/1/mean/c.0.0").unlink()
    with pytest.raises(BankCorrupt, match=r"mean/c.0.0 is missing"):
        open_bank(damaged)
