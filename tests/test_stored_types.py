"""Tokens in every stored type, from extraction through Zarr and the loader to training."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from fake_bank import N_CLIPS, SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.dtypes import STORED_TYPES
from patchbank.pipeline.bank.quantised import ChannelConstants, ChannelStatistics, block_rotation
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankCorrupt, BankError, BankIncomplete, BankMismatch
from patchbank.pipeline.extraction import Progress, extract
from patchbank.pipeline.tokens import store_tokens
from patchbank.probing import BatchLoader

TYPES = ("float16", "bfloat16", "float32", "int8", "int4")
ERROR = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 0.0, "int8": 2e-2, "int4": 0.4}
"""Largest error of one of the fake encoder's tokens, whose values lie between -3 and 3."""


@pytest.fixture(scope="module")
def banks(clip_table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bank]:
    """The same clips in every type; clip 3 has failed."""
    folder = Path(shutil.copytree(clip_table.parent, tmp_path_factory.mktemp("types") / "set"))
    (folder / "audio/0003.wav").write_bytes(b"no audio")
    return {
        name: extract(
            folder / "clips.csv",
            encoder="fake",
            out=folder.parent / f"{name}.bank",
            settings=replace(SETTINGS, stored_dtype=name),  # type: ignore[arg-type]
        )
        for name in TYPES
    }


def loaded(bank: Bank, layer: int, kind: str = "patches") -> np.ndarray:
    """All tokens through the loader, as float32, in the order of rows; a failed clip is NaN."""
    array = bank.array(layer, kind)
    out = np.full((bank.n_rows, array.n_tokens, array.dim), np.nan, np.float32)
    for batch in BatchLoader(bank, layer=layer, batch_size=16):
        tokens = getattr(batch, kind)
        assert tokens.is_floating_point()
        out[batch.rows] = tokens.float().numpy()
    return out


@pytest.mark.parametrize("name", TYPES)
def test_every_type_gives_back_the_tokens_that_went_in(banks: dict[str, Bank], name: str) -> None:
    for layer, kind in ((1, "patches"), (2, "patches"), (2, "prefix")):
        found = loaded(banks[name], layer, kind)
        expected = loaded(banks["float32"], layer, kind)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        assert np.nanmax(np.abs(found - expected)) <= ERROR[name]
        assert np.isnan(found[3]).all()


@pytest.mark.parametrize("name", TYPES)
def test_every_bank_is_whole_and_says_what_it_holds(banks: dict[str, Bank], name: str) -> None:
    bank = banks[name]
    assert verify_bank(bank.path) == ()
    assert bank.card["stored_dtype"] == name
    assert bank.fingerprint not in {other.fingerprint for n, other in banks.items() if n != name}
    assert len({other.encoder_id for other in banks.values()}) == 1


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
def test_plain_zarr_tells_what_integers_mean(banks: dict[str, Bank], name: str) -> None:
    group = zarr.open_group(banks[name].path / "layers/1", mode="r")
    codes = np.asarray(group["patches"][:])
    attributes = dict(group["patches"].attrs)
    assert attributes["stored_dtype"] == name
    if name == "bfloat16":
        assert "uint32(x) << 16) viewed as float32" in str(attributes["decoding"])
        values = (codes.astype(np.uint32) << 16).view(np.float32)
    else:
        assert "scale[..., None]" in str(attributes["decoding"])
        if name == "int4":
            assert "low half of a byte is the code + 8" in str(attributes["decoding"])
            codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1) - 8.0
        values = codes * np.asarray(group["scale"][:], np.float32)[..., None]
        if name == "int4":
            rotation = np.asarray(group["rotation"][:])
            blocks = values.reshape(*values.shape[:2], -1, len(rotation))
            values = (blocks @ rotation).reshape(values.shape)
        values = values * np.asarray(group["channel_scale"][:])
        values = values + np.asarray(group["channel_shift"][:])
    np.testing.assert_allclose(values, loaded(banks[name], 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TYPES)
def test_pooled_vectors_are_of_the_stored_values(banks: dict[str, Bank], name: str) -> None:
    bank = banks[name]
    tokens = loaded(bank, 2)
    np.testing.assert_allclose(bank.pooled(2, "mean"), tokens.mean(1), atol=1e-5)
    np.testing.assert_allclose(bank.pooled(2, "max"), tokens.max(1), atol=1e-5)
    np.testing.assert_allclose(bank.pooled(2, "min"), tokens.min(1), atol=1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_a_failed_clip_holds_the_fill_that_a_missing_one_reads_as(
    banks: dict[str, Bank], name: str
) -> None:
    stored = STORED_TYPES[name]
    array = zarr.open_array(banks[name].path / "layers/1/patches", mode="r")
    np.testing.assert_array_equal(array[3], np.full_like(array[3], stored.fill))
    np.testing.assert_array_equal(np.asarray(array.fill_value), np.asarray(stored.fill))


def test_an_int8_bank_is_half_of_a_float16_one_and_its_prefix_stays_float16(
    banks: dict[str, Bank],
) -> None:
    assert banks["int8"].array(2).row_bytes * 2 == banks["float16"].array(2).row_bytes
    assert banks["int8"].array(2, "prefix").dtype == np.float16
    assert banks["int4"].array(2).row_bytes * 4 == banks["float16"].array(2).row_bytes


def test_the_calibration_is_part_of_the_recipe_and_of_no_shard(banks: dict[str, Bank]) -> None:
    quantisation = banks["int8"].card["quantisation"]
    assert quantisation["calibration_clips"] == 512
    constants = banks["int8"].constants(1)
    assert quantisation["constants_sha256"]["1"] == constants.sha256
    tokens = loaded(banks["float32"], 1).reshape(N_CLIPS, -1, 8)
    good = tokens[~np.isnan(tokens).any((1, 2))].reshape(-1, 8).astype(np.float64)
    np.testing.assert_allclose(constants.shift, good.mean(0), rtol=1e-5)
    np.testing.assert_allclose(constants.scale, good.std(0), rtol=1e-5)


def test_a_float_bank_has_no_scale(banks: dict[str, Bank]) -> None:
    with pytest.raises(BankError, match="layer 1 has no scale"):
        banks["float16"].scale(1)


def test_an_int8_extraction_is_resumed_with_the_constants_of_its_bank(
    banks: dict[str, Bank], tmp_path: Path
) -> None:
    table = banks["int8"].path.parent / "set/clips.csv"
    bank = Path(shutil.copytree(banks["int8"].path, tmp_path / "x.bank"))
    chosen = replace(SETTINGS, stored_dtype="int8")
    again = extract(table, encoder="fake", out=bank, settings=chosen)
    assert again.root_sha256 == banks["int8"].root_sha256
    unfinished = tmp_path / "y.bank"

    def stop(progress: Progress) -> None:
        if not progress.doing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(table, encoder="fake", out=unfinished, settings=chosen, progress=stop)
    with pytest.raises(BankIncomplete):
        open_bank(unfinished)
    resumed = extract(table, encoder="fake", out=unfinished, settings=chosen)
    assert resumed.root_sha256 == again.root_sha256
    with pytest.raises(BankMismatch, match="stored_dtype: found 'int8', expected 'float16'"):
        extract(table, encoder="fake", out=bank, settings=SETTINGS)


def test_other_channel_constants_than_the_card_names_are_refused(
    banks: dict[str, Bank], tmp_path: Path
) -> None:
    bank = Path(shutil.copytree(banks["int8"].path, tmp_path / "x.bank"))
    path = bank / "layers/1/channel_scale/c.0"
    values = np.fromfile(path, "<f4")
    values[0] *= 2
    values.tofile(path)
    with pytest.raises(BankCorrupt, match=r"constants of layer 1 are damaged \(the card names"):
        open_bank(bank).constants(1)


def test_a_card_of_an_unknown_type_is_refused(banks: dict[str, Bank], tmp_path: Path) -> None:
    from patchbank.pipeline.bank.card import schema_of_card

    card = json.loads(json.dumps(banks["float16"].card)) | {"stored_dtype": "float8"}
    with pytest.raises(ValueError, match="float8"):
        schema_of_card(card)


def test_codes_of_four_bits_come_back_from_their_bytes() -> None:
    codes = np.random.default_rng(0).integers(-7, 8, (3, 4, 10)).astype(np.int8)
    packed = STORED_TYPES["int4"].from_codes(codes)
    assert (packed.shape, packed.dtype) == ((3, 4, 5), np.uint8)
    assert packed.min() > 0
    np.testing.assert_array_equal(STORED_TYPES["int4"].to_codes(packed), codes)
    fill = np.zeros((1, 5), np.uint8)
    assert (STORED_TYPES["int4"].to_codes(fill) == -8).all()


@pytest.mark.parametrize(("dim", "block"), [(384, 128), (768, 256), (12, 4), (6, 2), (8, 8)])
def test_the_rotation_is_orthogonal_and_spreads_a_channel(dim: int, block: int) -> None:
    rotation = block_rotation(dim)
    assert rotation.shape == (block, block)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(block), atol=1e-5)
    np.testing.assert_allclose(np.abs(rotation), block**-0.5, rtol=1e-6)


def test_int4_keeps_a_token_with_one_large_channel() -> None:
    random = np.random.default_rng(0)
    tokens = random.standard_normal((4, 16, 64)).astype(np.float32)
    tokens[:, :, 3] += 40
    statistics = ChannelStatistics(64)
    statistics.add(random.standard_normal((999, 64)).astype(np.float32))
    constants = statistics.constants()

    def error(rotated: bool) -> float:
        chosen = constants.for_type(STORED_TYPES["int4"]) if rotated else constants
        stored = store_tokens(
            torch.from_numpy(tokens),
            stored=STORED_TYPES["int4"],
            n_counted=torch.full((4,), 16),
            constants=chosen,
        )
        assert stored.scale is not None
        found = chosen.dequantise(STORED_TYPES["int4"].to_codes(stored.tokens), stored.scale)
        return float(np.square(found - tokens)[:, :, 4:].mean())

    assert error(True) < 0.5 * error(False)


def test_int4_of_an_odd_width_is_refused() -> None:
    from patchbank.pipeline.errors import PatchbankError
    from patchbank.pipeline.plan import schema_for
    from patchbank.pipeline.specs import Grid, LayerSpec

    with pytest.raises(PatchbankError, match="packs channels in pairs, layer 3 has 5; choose"):
        schema_for((LayerSpec(3, "x", 5),), {3: Grid(2, 1)}, stored_dtype="int4", n_clips=1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    spread=st.floats(1e-3, 1e3),
    n_tokens=st.integers(1, 12),
    dim=st.integers(1, 40),
)
def test_int8_errs_by_half_a_step_of_its_scale_at_the_most(
    seed: int, spread: float, n_tokens: int, dim: int
) -> None:
    random = np.random.default_rng(seed)
    size = spread * np.exp(random.standard_normal(dim))
    tokens = (random.standard_normal((3, n_tokens, dim)) * size + size).astype(np.float32)
    statistics = ChannelStatistics(dim)
    statistics.add(tokens.reshape(-1, dim))
    constants = statistics.constants()
    stored = store_tokens(
        torch.from_numpy(tokens),
        stored=STORED_TYPES["int8"],
        n_counted=torch.full((3,), n_tokens),
        constants=constants,
    )
    assert stored.scale is not None
    assert np.abs(stored.tokens).max() <= 127
    found = constants.dequantise(stored.tokens, stored.scale)
    step = stored.scale.astype(np.float32)[..., None] * constants.scale
    # The scale is rounded to float16 before the codes are chosen: the largest code may move by
    # 127 * 2**-11 beyond its half step.
    assert (np.abs(found - tokens) <= 0.57 * step + 1e-5 * np.abs(tokens) + 1e-6).all()


def test_statistics_do_not_depend_on_how_tokens_come() -> None:
    tokens = np.random.default_rng(0).standard_normal((999, 5)).astype(np.float32) + 1e3
    together, apart = ChannelStatistics(5), ChannelStatistics(5)
    together.add(tokens)
    for part in np.array_split(tokens, 7):
        apart.add(part)
    one, other = together.constants(), apart.constants()
    np.testing.assert_allclose(one.shift, other.shift, rtol=1e-7)
    np.testing.assert_allclose(one.scale, other.scale, rtol=1e-6)
    np.testing.assert_allclose(one.scale, tokens.astype(np.float64).std(0), rtol=1e-5)


def test_a_channel_that_never_moves_divides_by_one() -> None:
    statistics = ChannelStatistics(2)
    statistics.add(np.array([[4.0, 1.0], [4.0, 2.0]], np.float32))
    assert statistics.constants().scale[0] == 1.0
    with pytest.raises(ValueError, match="no tokens"):
        ChannelStatistics(2).constants()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param(float("nan"), "1 token values are NaN or infinite", id="nan"),
        pytest.param(float("inf"), "1 token values are NaN or infinite", id="infinity"),
        pytest.param(0.0, "all token values are zero", id="zeros"),
        pytest.param(3e38, "beyond the range of", id="overflow"),
    ],
)
def test_what_cannot_be_stored_is_caught_in_every_type(name: str, value: float, words: str) -> None:
    if value == 3e38 and name in ("bfloat16", "float32"):
        pytest.skip("these types reach that far")
    tokens = torch.ones(2, 3, 4) + torch.arange(4)
    if value == 0.0:
        tokens[1] = 0
    else:
        tokens[1, 2, 3] = value
    constants = ChannelConstants(np.zeros(4, np.float32), np.ones(4, np.float32))
    stored = store_tokens(
        tokens, stored=STORED_TYPES[name], n_counted=torch.tensor([3, 3]), constants=constants
    )
    assert stored.failures[0] is None
    assert stored.failures[1] is not None
    assert words in stored.failures[1]
    fill = np.full_like(stored.tokens[1], STORED_TYPES[name].fill)
    np.testing.assert_array_equal(stored.tokens[1], fill)


def test_a_clip_that_vanishes_in_float16_is_caught() -> None:
    stored = store_tokens(
        torch.full((1, 2, 2), 1e-9), stored=STORED_TYPES["float16"], n_counted=torch.tensor([2])
    )
    assert stored.failures == ("all token values are zero",)


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
def test_probes_train_on_small_types_as_on_float16(
    name: str, banks: dict[str, Bank], tmp_path: Path
) -> None:
    from patchbank.probing.run import run_training
    from patchbank.probing.settings import SearchSettings, TrainSettings

    labels = banks[name].path.parent / "set/labels.csv"
    scores = {}
    for one in ("float16", name):
        results = run_training(
            banks[one],
            labels,
            tmp_path / one,
            probes=["linear", "protobin"],
            settings=TrainSettings(n_epochs=15, n_seeds=2, search=SearchSettings(n_candidates=2)),
            layer=2,
        )
        scores[one] = [
            row["mean"]
            for row in results["scores"]
            if row["split"] == "test" and row["metric"] == results["primary_metric"]
        ]
    assert min(scores["float16"]) > 0.7
    np.testing.assert_allclose(scores[name], scores["float16"], atol=0.05)
