"""Banks of pooled vectors: what is left of a bank without its tokens."""

from __future__ import annotations

import shutil
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
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankError,
    BankMismatch,
    PatchbankError,
    TrialError,
)
from patchbank.pipeline.extraction import extract
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.pipeline.selection import make_selection, select
from patchbank.probing import BatchLoader
from patchbank.probing.entries import parse_probe
from patchbank.probing.run import run_training
from patchbank.probing.settings import SearchSettings, TrainSettings

MEANS = ("linear", "mlp", "knn", "linpre:pooling=mean")
QUICK = TrainSettings(
    n_epochs=3,
    n_seeds=2,
    search=SearchSettings(n_candidates=2),
    batch_size=16,
    n_resamples=20,
    device="cpu",
)
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


def test_two_of_them_join_and_one_joins_no_tokens(thin: Bank, sealed: Bank, tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def runs(
    thin: Bank, sealed: Bank, clip_table: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any], list[str]]]:
    """Probes on means, trained from the whole bank and from pooled vectors."""
    found = {}
    for name, bank in (("whole", sealed), ("thin", thin)):
        out, said = tmp_path_factory.mktemp("runs") / name, list[str]()
        results = run_training(
            bank,
            clip_table.with_name("labels.csv"),
            out,
            probes=[parse_probe(probe) for probe in MEANS],
            settings=QUICK,
            layer=[(1,), (2,)],
            say=said.append,
        )
        found[name] = (out, results, said)
    return found


def test_probes_on_means_find_the_same_numbers(runs: dict[str, Any]) -> None:
    (_, whole, _), (_, thin, said) = runs["whole"], runs["thin"]
    assert "tokens are not in the bank: probes read the stored means" in said
    assert len(whole["scores"]) == len(thin["scores"]) >= 2 * len(MEANS)
    for expected, found in zip(whole["scores"], thin["scores"], strict=True):
        assert (found["probe"], found["metric"]) == (expected["probe"], expected["metric"])
        assert found["mean"] == pytest.approx(expected["mean"], abs=1e-6)


def test_predictions_need_no_tokens_either(runs: dict[str, Any], thin: Bank, sealed: Bank) -> None:
    predictor = Predictor(runs["thin"][0], probe="linear@2")
    from_means, from_tokens = (list(predictor.bank(bank)) for bank in (thin, sealed))
    assert [one.clip for one in from_means] == [one.clip for one in from_tokens]
    for one, other in zip(from_means, from_tokens, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-5)
    with pytest.raises(BankError, match="holds pooled vectors only"):
        list(predictor.bank(thin, frames=True))


def test_probes_that_read_tokens_are_named_before_anything_starts(
    thin: Bank, clip_table: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrialError, match=r"only, and linear-cls, protobin read tokens; train lin"):
        run_training(
            thin,
            clip_table.with_name("labels.csv"),
            tmp_path / "run",
            probes=["linear", "protobin", "linear-cls"],
            settings=QUICK,
            progress=lambda event: pytest.fail("a pass began"),
        )


def test_the_command_makes_and_shows_one(
    sealed: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, line = tmp_path / "t.bank", ["bank", "convert", str(sealed.path), "--pooled-only"]
    assert main([*line, "--split", "train", "--layers", "2", "--out", str(out)]) == 0
    assert main(["bank", "show", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "pooled vectors of these tokens only (mean, max, min)" in shown
    assert "float16, 40 clips, layers 1,2, of which split train" in shown
    assert main(["bank", "ls", str(tmp_path)]) == 0
    assert "float16 pooled, 20 clips" in capsys.readouterr().out
    assert main(["bank", "verify", str(out)]) == 0
    again = ["bank", "convert", str(out), "--pooled-only", "--out", str(tmp_path / "x.bank")]
    assert main(again) == 2
    assert main([*line, "--archive", "--out", str(tmp_path / "x.bank")]) == 1
    assert "--archive is for tokens" in capsys.readouterr().err
