"""What is drawn for views: from a seed, the clip, the view, and the clips of its split and fold."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_views import EVERYTHING, MADE, N_ROWS, by_key

from patchbank.cli.augment import parse_augment
from patchbank.pipeline.bank import Bank
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.errors import ManifestError, PatchbankError
from patchbank.pipeline.extraction import ExtractionSettings, extract, prepare
from patchbank.pipeline.manifest import ClipTable
from patchbank.pipeline.specs import (
    AugmentSpec,
    GainSpec,
    MixupSpec,
    Recipe,
    ShiftSpec,
    WindowSpec,
)
from patchbank.pipeline.views import with_views

MIXUP = AugmentSpec(MixupSpec())
RATE_HZ, WINDOW_SAMPLES = 16_000, 16_000
PINNED: dict[tuple[str, int], tuple[Any, ...]] = {
    ("c0000", 1): (
        ["c0018", "c0058"],
        [10.367852975816312, 12.38121126559508],
        11136,
        3.497380443139946,
    ),
    ("c0007", 3): (
        ["c0016", "c0039", "c0010"],
        [25.491540279369776, 4.667501553924763, 6.271560464802477],
        989,
        -5.271328912141716,
    ),
    ("c0041", 2): (
        ["c0008", "c0031"],
        [8.905400561805745, 5.787657079716857],
        5473,
        -1.8464639922153427,
    ),
    ("c0059", 1): (
        ["c0014", "c0006"],
        [9.610311508632616, 8.929353684926113],
        11049,
        -0.40188190061152174,
    ),
}


def clip_table(n_clips: int, **columns: list[Any]) -> ClipTable:
    ids = [f"c{number:04d}" for number in range(n_clips)]
    clips = {
        "clip_id": ids,
        "view": pa.array([0] * n_clips, pa.int16()),
        "path": [f"{name}.wav" for name in ids],
        "start_s": [0.0] * n_clips,
        "duration_s": [1.0] * n_clips,
    }
    return ClipTable(pa.table(clips | columns), Path("audio"), None, "clips.csv")


def drawn(
    table: ClipTable, augment: AugmentSpec, *, n_views: int = 2, known: pa.Table | None = None
) -> pa.Table:
    return with_views(
        table,
        augment,
        n_views=n_views,
        sample_rate_hz=RATE_HZ,
        window_samples=WINDOW_SAMPLES,
        known=known,
    )


def views_of(clips: pa.Table) -> list[dict[str, Any]]:
    return [row for row in clips.to_pylist() if row["view"]]


def test_the_recipe_of_birdset_is_what_is_drawn() -> None:
    table = clip_table(300, split=["train"] * 300)
    rows = views_of(drawn(table, MIXUP, n_views=5))
    counts = Counter(len(row["mix_sources"]) for row in rows)
    assert len(rows) == 1_500
    # Five standard deviations of a share of 0.1 over 1,500 rows.
    assert counts[0] / 1_500 == pytest.approx(0.1, abs=5 * 0.0078)
    for n_sources in (1, 2, 3):
        assert counts[n_sources] / 1_500 == pytest.approx(0.3, abs=5 * 0.0118)
    assert set(counts) == {0, 1, 2, 3}
    snr_db = np.array([level for row in rows for level in row["mix_snr_db"]])
    assert 2.0 <= snr_db.min() < 2.2
    assert 29.8 < snr_db.max() < 30.0
    shares = np.histogram(snr_db, bins=7, range=(2.0, 30.0))[0] / len(snr_db)
    np.testing.assert_allclose(shares, 1 / 7, atol=5 * np.sqrt(6 / 49 / len(snr_db)))
    for row in rows:
        sources = row["mix_sources"]
        assert len(row["mix_snr_db"]) == len(sources) == len({*sources, row["clip_id"]}) - 1
    used = Counter(name for row in rows for name in row["mix_sources"])
    assert len(used) == 300
    assert max(used.values()) < 4 * sum(used.values()) / 300
    # The second of two different clips is as likely to come before the first as behind it.
    pairs = [row["mix_sources"] for row in rows if len(row["mix_sources"]) > 1]
    assert np.mean([one < two for one, two, *_ in pairs]) == pytest.approx(0.5, abs=0.09)


def test_parameters_bound_what_is_drawn() -> None:
    augment = AugmentSpec(
        MixupSpec(p=0.5, min_snr_db=-3, max_snr_db=-1, max_sources=1),
        ShiftSpec(max_s=0.25),
        GainSpec(-12, 0),
    )
    rows = views_of(drawn(clip_table(300, split=["train"] * 300), augment))
    assert {len(row["mix_sources"]) for row in rows} == {0, 1}
    assert np.mean([bool(row["mix_sources"]) for row in rows]) == pytest.approx(0.5, abs=0.1)
    levels = [level for row in rows for level in row["mix_snr_db"]]
    assert -3 <= min(levels) < -2.9 < -1.1 < max(levels) <= -1
    shifts = np.array([row["shift_samples"] for row in rows])
    assert -4_000 <= shifts.min() < -3_900 < 3_900 < shifts.max() <= 4_000
    gains = np.array([row["gain_db"] for row in rows])
    assert -12 <= gains.min() < -11.8 < -0.2 < gains.max() <= 0


def test_a_shift_without_a_limit_reaches_the_whole_window() -> None:
    augment = AugmentSpec(shift=ShiftSpec())
    clips = drawn(clip_table(400, split=["train"] * 400), augment)
    shifts = [row["shift_samples"] for row in views_of(clips)]
    assert 0 <= min(shifts) < 200 < 15_800 < max(shifts) < WINDOW_SAMPLES
    assert np.mean(shifts) == pytest.approx(8_000, abs=5 * 4_619 / np.sqrt(800))
    assert "mix_sources" not in clips.column_names


def test_a_draw_follows_from_a_hash_and_from_no_library() -> None:
    def uniforms(purpose: str, n: int) -> list[float]:
        words = np.frombuffer(
            hashlib.shake_256(f'[7,"{purpose}","c0004",2]'.encode()).digest(8 * n), "<u8"
        )
        return [int(word) // 2**11 / 2**53 for word in words]

    augment = replace(EVERYTHING, seed=7)
    found = by_key(drawn(clip_table(9, split=["train"] * 9), augment))["c0004", 2]
    whether, how_many, *numbers = uniforms("mixup", 8)
    others = [f"c{number:04d}" for number in range(9) if number != 4]
    n_sources = 1 + int(3 * how_many)
    sources = [others.pop(int(number * len(others))) for number in numbers[:n_sources]]
    assert whether < 0.9
    assert n_sources > 1
    assert found["mix_sources"] == sources
    assert found["mix_snr_db"] == [2.0 + 28.0 * number for number in numbers[3:][:n_sources]]
    assert found["shift_samples"] == int(WINDOW_SAMPLES * uniforms("shift", 1)[0])
    assert found["gain_db"] == -6.0 + 12.0 * uniforms("gain", 1)[0]


def test_order_and_other_columns_of_the_table_change_no_draw() -> None:
    table = clip_table(40, split=["train"] * 40, note=[str(n) for n in range(40)])
    order = np.random.default_rng(0).permutation(40)
    turned = replace(table, clips=table.clips.take(order))
    expected = by_key(drawn(table, EVERYTHING))
    assert by_key(drawn(turned, EVERYTHING)) == expected
    assert expected["c0003", 2]["note"] == "3"


def test_other_augmentations_and_more_views_change_no_draw() -> None:
    table = clip_table(40, split=["train"] * 40)
    expected = by_key(drawn(table, MIXUP))
    found = by_key(drawn(table, EVERYTHING, n_views=4))
    for key, row in expected.items():
        assert {name: found[key][name] for name in row} == row


def test_another_seed_gives_other_draws() -> None:
    table = clip_table(40, split=["train"] * 40)
    first, second = (
        [row["mix_sources"] for row in views_of(drawn(table, replace(MIXUP, seed=seed)))]
        for seed in (0, 1)
    )
    assert sum(one == other for one, other in zip(first, second, strict=True)) < 20


def test_only_training_clips_get_views_and_nothing_else_is_mixed_in() -> None:
    splits = ["train", "valid", "test", "train"] * 15
    folds = ["1", "1", "1", "2"] * 15
    table = clip_table(60, split=splits, fold=folds)
    clips = drawn(table, MIXUP, n_views=3)
    rows = by_key(clips)
    assert Counter(row["split"] for row in views_of(clips)) == {"train": 90}
    assert [key for key in rows if key[1] == 0] == [(f"c{n:04d}", 0) for n in range(60)]
    for row in views_of(clips):
        for name in row["mix_sources"]:
            assert (rows[name, 0]["split"], rows[name, 0]["fold"]) == ("train", row["fold"])
    assert all(row["mix_sources"] == [] for row in rows.values() if not row["view"])
    assert list(rows)[:5] == [("c0000", 0), ("c0000", 1), ("c0000", 2), ("c0000", 3), ("c0001", 0)]


def test_with_folds_alone_every_clip_of_a_fold_gets_views_from_its_fold() -> None:
    folds: list[str | None] = ["1", "2", "3", None] * 10
    clips = drawn(clip_table(40, fold=folds), MIXUP, n_views=3)
    rows = by_key(clips)
    assert Counter(row["fold"] for row in views_of(clips)) == {"1": 30, "2": 30, "3": 30}
    mixed = [(row["fold"], name) for row in views_of(clips) for name in row["mix_sources"]]
    assert mixed
    assert all(rows[name, 0]["fold"] == fold for fold, name in mixed)


def test_a_clip_without_audio_is_mixed_into_none() -> None:
    table = clip_table(4, split=["train"] * 4, duration_s=[1.0, 0.0, 1.0, 1.0])
    rows = views_of(drawn(table, MIXUP, n_views=20))
    assert len(rows) == 80
    assert {name for row in rows for name in row["mix_sources"]} == {"c0000", "c0002", "c0003"}
    assert max(len(row["mix_sources"]) for row in rows if row["clip_id"] != "c0001") == 2


def test_windows_of_a_recording_are_never_mixed_into_each_other() -> None:
    paths = [f"r{number % 7}.wav" for number in range(40)]
    clips = drawn(clip_table(40, split=["train"] * 40, path=paths), MIXUP, n_views=50)
    path_of = {row["clip_id"]: row["path"] for row in clips.to_pylist()}
    used = Counter()
    for row in views_of(clips):
        sources = [path_of[name] for name in row["mix_sources"]]
        assert row["path"] not in sources
        assert len(set(row["mix_sources"])) == len(sources)
        used.update((row["path"], name) for name in row["mix_sources"])
    # Every clip of another recording is as likely a source as any other.
    for path in set(paths):
        counts = [used[path, name] for name, other in path_of.items() if other != path]
        mean = np.mean(counts)
        assert np.abs(np.array(counts) - mean).max() < 6 * np.sqrt(mean)


def test_sources_of_a_recording_are_those_of_a_table_without_its_other_windows() -> None:
    paths = ["b.wav", "a.wav", "b.wav", "c.wav", "d.wav", "b.wav", "e.wav", "a.wav"]
    table = clip_table(8, split=["train"] * 8, path=paths)
    found = by_key(drawn(table, MIXUP, n_views=9))
    for path in set(paths):
        own = [row for row, other in enumerate(paths) if other == path]
        for row in own:
            kept = [other for other in range(8) if other == row or other not in own]
            alone = by_key(drawn(replace(table, clips=table.clips.take(kept)), MIXUP, n_views=9))
            for view in range(1, 10):
                key = (f"c{row:04d}", view)
                assert found[key] == alone[key]


def test_draws_are_what_they_always_were() -> None:
    rows = by_key(drawn(clip_table(60, split=["train"] * 60), EVERYTHING, n_views=3))
    columns = ("mix_sources", "mix_snr_db", "shift_samples", "gain_db")
    assert [tuple(rows[key][name] for name in columns) for key in PINNED] == list(PINNED.values())


def test_known_rows_keep_their_draws_and_new_ones_draw_from_all() -> None:
    small, large = (clip_table(n, split=["train"] * n) for n in (10, 60))
    known = drawn(small, EVERYTHING)
    grown = by_key(drawn(large, EVERYTHING, n_views=3, known=known))
    assert {key: grown[key] for key in by_key(known)} == by_key(known)
    fresh = [row for key, row in grown.items() if key not in by_key(known) and row["view"]]
    assert len(fresh) == 10 + 50 * 3
    mixed = {name for row in fresh for name in row["mix_sources"]}
    assert mixed & set(small.clips["clip_id"].to_pylist())
    assert mixed & set(large.clips["clip_id"].to_pylist()[10:])
    at_once = by_key(drawn(large, EVERYTHING, n_views=3))
    assert {key: at_once[key] for key in by_key(known)} != by_key(known)
    assert all(at_once[row["clip_id"], row["view"]] == row for row in fresh)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        pytest.param(
            clip_table(3),
            "found neither a split nor a fold column, .* put train/, valid/ and test/ above the "
            "class folders, or pass a CLIPS.csv with path and split",
            id="no split",
        ),
        pytest.param(
            clip_table(3, split=["test"] * 3),
            "split: found no clip of split 'train'",
            id="no train",
        ),
        pytest.param(
            clip_table(2, fold=pa.nulls(2, pa.string())), "fold: every cell is empty", id="no fold"
        ),
        pytest.param(
            clip_table(2, split=["train", "test"]),
            "found no clip to mix into 'c0000': its recording is the only one with audio in split "
            "'train'; leave --augment mixup out",
            id="a single clip",
        ),
        pytest.param(
            clip_table(3, split=["train"] * 3, path=["long.wav"] * 3),
            "found no clip to mix into 'c0000': its recording is the only one with audio",
            id="a single recording",
        ),
        pytest.param(
            clip_table(3, split=["train"] * 3, fold=["1", "1", "2"]),
            "found no clip to mix into 'c0002': .* in split 'train' and fold '2'",
            id="a single clip of a fold",
        ),
        pytest.param(
            clip_table(2, split=["train"] * 2, view=pa.array([0, 1], pa.int16())),
            "view: found view 1 of 'c0001', expected clean clips .* leave --views out",
            id="views of the user's",
        ),
        pytest.param(
            clip_table(2, split=["train"] * 2, gain_db=[0.0, 0.0]),
            "clips.csv:gain_db: a bank that makes views writes a column of that name",
            id="a column of that name",
        ),
    ],
)
def test_a_table_that_no_views_can_be_made_of_is_refused(table: ClipTable, words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        drawn(table, MIXUP)


def test_clips_without_audio_can_be_shifted() -> None:
    table = clip_table(2, split=["train"] * 2, duration_s=[0.0] * 2)
    assert len(drawn(table, AugmentSpec(shift=ShiftSpec()), n_views=5)) == 12


def test_a_single_clip_can_be_shifted() -> None:
    table = clip_table(1, split=["train"])
    assert len(drawn(table, AugmentSpec(shift=ShiftSpec()), n_views=5)) == 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda: MixupSpec(p=1.5), "p must be between 0 and 1, found 1.5", id="p"),
        pytest.param(lambda: MixupSpec(min_snr_db=31), "max_snr_db must be between 31", id="snr"),
        pytest.param(lambda: MixupSpec(max_sources=0), "max_sources must be a whole", id="sources"),
        pytest.param(lambda: ShiftSpec(-1.0), "shift: max_s must be between 0", id="shift"),
        pytest.param(lambda: GainSpec(3, -3), "gain: max_db must be between 3", id="gain"),
        pytest.param(lambda: GainSpec(float("nan")), "gain: ", id="nan"),
        pytest.param(lambda: AugmentSpec(), "found no augmentation, expected mixup", id="nothing"),
        pytest.param(lambda: AugmentSpec(MixupSpec(), seed=-1), "seed must be a whole", id="seed"),
        pytest.param(
            lambda: ExtractionSettings(n_views=5),
            "found 5 views and no augmentation, .* --augment mixup",
            id="views alone",
        ),
        pytest.param(
            lambda: ExtractionSettings(augment=MIXUP),
            "found an augmentation and no number of views, .* --views 5",
            id="augmentation alone",
        ),
    ],
)
def test_settings_that_make_no_views_are_refused(make: Any, words: str) -> None:
    with pytest.raises(PatchbankError, match=words):
        make()


@pytest.mark.parametrize(
    "augment",
    [
        MIXUP,
        replace(EVERYTHING, seed=7),
        AugmentSpec(MixupSpec(0.5, -1.5, 1e-05, 2), ShiftSpec(0.25), GainSpec(-3, 1)),
    ],
)
def test_an_augmentation_says_what_to_type_for_it(augment: AugmentSpec) -> None:
    words = iter(augment.options.split())
    typed = list(zip(words, words, strict=True))
    texts = [value for name, value in typed if name == "--augment"]
    seeds = [int(value) for name, value in typed if name == "--augment-seed"]
    assert parse_augment(texts, n_views=1, seed=next(iter(seeds), None)) == augment


def test_views_are_drawn_once_for_the_bank_that_is_there(
    made: Bank, clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number that is drawn costs a hash: one for each view and augmentation."""
    folder = Path(shutil.copytree(clip_table.parent, tmp_path / "set"))
    shutil.copy(folder / "audio/0000.wav", folder / "new.wav")
    with (folder / "clips.csv").open("a") as file:
        file.write("new.wav,train\n")
    n_drawn = 0
    real = hashlib.shake_256

    def counted(data: bytes) -> Any:
        nonlocal n_drawn
        n_drawn += 1
        return real(data)

    monkeypatch.setattr(hashlib, "shake_256", counted)
    path = Path(shutil.copytree(made.path, tmp_path / "x.bank"))
    table = folder / "clips.csv"
    bank = extract(table, encoder="fake", out=path, settings=MADE)
    assert bank.n_clips == N_ROWS + 3
    assert n_drawn == 2 * 3
    n_drawn = 0
    again = prepare(table, encoder="fake", out=path, settings=MADE)
    assert again.plan.missing_shards == ()
    assert n_drawn == 0
    extract(clip_table, encoder="fake", out=tmp_path / "y.bank", settings=MADE)
    assert n_drawn == 20 * 2 * 3


def test_banks_without_views_keep_the_recipe_that_they_had() -> None:
    recipe = Recipe(load_encoder("fake").spec, WindowSpec(1.0, 1.0), (1, 2))
    assert recipe.recipe_id == "143e2f8a609b30f5d2714e688031db86f2f1588612b19e7468cfa8eaa333de4e"
    assert "augment" not in recipe.identity()
    identities = {
        replace(recipe, augment=augment).recipe_id
        for augment in (
            None,
            MIXUP,
            replace(MIXUP, seed=1),
            AugmentSpec(MixupSpec(p=0.8)),
            EVERYTHING,
        )
    }
    assert len(identities) == 5
    assert replace(recipe, augment=AugmentSpec(MixupSpec(min_snr_db=2))).recipe_id == (
        replace(recipe, augment=MIXUP).recipe_id
    )
