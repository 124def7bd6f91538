"""What an encoder computes in: chosen once, recorded, and the same when a bank is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from fake_bank import N_CLIPS, SETTINGS

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.environment import default_compute_dtype
from patchbank.pipeline.errors import BankMismatch
from patchbank.pipeline.extraction import extract, prepare

HALF = replace(SETTINGS, compute_dtype="bfloat16", stored_dtype="float32")


@pytest.fixture(scope="module")
def half(clip_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    out = tmp_path_factory.mktemp("half") / "half.bank"
    return extract(clip_table, encoder="fake", out=out, settings=HALF)


def tokens(bank: Bank, layer: int) -> np.ndarray:
    array = zarr.open_array(bank.path / f"layers/{layer}/patches", mode="r")
    return np.asarray(array[:N_CLIPS])


def test_a_cpu_computes_in_float32_unless_told() -> None:
    assert default_compute_dtype("cpu") == "float32"


def test_what_was_computed_in_is_in_the_card_and_in_the_recipe(
    half: Bank, clip_table: Path, tmp_path: Path
) -> None:
    settings = replace(HALF, compute_dtype="float32")
    full = extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=settings)
    assert half.card["compute_dtype"] == "bfloat16"
    assert full.card["compute_dtype"] == "float32"
    assert half.recipe_id != full.recipe_id
    assert half.card["encoder"] == full.card["encoder"]
    for layer in half.layers:
        error = np.abs(tokens(half, layer) - tokens(full, layer)).max()
        # Eight bits of mantissa in the products; front end and stored tokens have them all.
        assert 1e-5 < error < 0.05


def test_a_bank_is_finished_in_what_it_was_begun_with(half: Bank, clip_table: Path) -> None:
    asked_nothing = replace(HALF, compute_dtype=None)
    again = prepare(clip_table, encoder="fake", out=half.path, settings=asked_nothing)
    assert again.job.recipe.compute_dtype == "bfloat16"
    assert not again.plan.missing_shards
    with pytest.raises(BankMismatch, match=r"compute_dtype: found 'bfloat16', expected 'float32'"):
        prepare(
            clip_table,
            encoder="fake",
            out=half.path,
            settings=replace(HALF, compute_dtype="float32"),
        )


def test_full_batches_go_through_the_compiler_and_short_ones_do_not(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def compile_(
        function: Callable[..., Any], *, dynamic: bool, options: dict[str, Any]
    ) -> Callable[..., Any]:
        assert (dynamic, options) == (False, {"deterministic": True})

        def compiled(features: torch.Tensor, layers: Any) -> Any:
            sizes.append(len(features))
            return function(features, layers)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    settings = replace(SETTINGS, compiles=True, batch_size=7)
    bank = extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=settings)
    rows = [len(bank.schema.rows_of(shard)) for shard in range(bank.schema.n_shards)]
    assert sizes == [7] * sum(n_rows // 7 for n_rows in rows)
    assert any(n_rows % 7 for n_rows in rows)
    assert bank.card["extraction"]["compiled"] is True


def test_a_bank_of_shards_below_a_batch_is_compiled_too(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def compile_(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        return lambda features, layers: (sizes.append(len(features)), function(features, layers))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    settings = replace(SETTINGS, compiles=True, batch_size=64)
    bank = extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=settings)
    assert sizes == [16, 16]
    assert [len(bank.schema.rows_of(shard)) for shard in range(3)] == [16, 16, 8]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_encoder_gives_its_tokens(clip_table: Path, tmp_path: Path) -> None:
    plain, compiled = (
        extract(
            clip_table,
            encoder="tiny",
            out=tmp_path / f"{compiles}.bank",
            settings=replace(SETTINGS, stored_dtype="float32", compiles=compiles),
        )
        for compiles in (False, True)
    )
    for layer in plain.layers:
        np.testing.assert_allclose(tokens(compiled, layer), tokens(plain, layer), atol=1e-4)
