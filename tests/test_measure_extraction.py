"""What `extract --dry-run --measure` foretells, and that it leaves nothing."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from audio_sets import write_clip_set
from fake_bank import N_CLIPS, SETTINGS
from made_views import MADE
from typer.testing import CliRunner

from patchbank.cli.main import app
from patchbank.pipeline.bank import Bank
from patchbank.pipeline.encoders.fake import FakeEncoder
from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.extraction import prepare
from patchbank.pipeline.measure import measure
from patchbank.pipeline.specs import AugmentSpec

BATCH_S = 0.05


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder whose time is known: 4 clips in 50 ms, in one lane 80 clips/s at most."""
    encode = FakeEncoder.encode

    def slowed(self: FakeEncoder, *arguments: Any) -> object:
        time.sleep(BATCH_S)
        return encode(self, *arguments)

    monkeypatch.setattr(FakeEncoder, "encode", slowed)


def test_the_rate_is_that_of_the_slowest_stage(tmp_path: Path, slow: None) -> None:
    table = write_clip_set(tmp_path / "set", n_clips=600)
    out = tmp_path / "x.bank"
    settings = replace(SETTINGS, n_threads=1)
    extraction = prepare(table, encoder="fake", out=out, settings=settings)
    forecast = measure(extraction, for_s=3.0)
    # A sleeping encoder can be no faster, and a busy machine makes it slower.
    assert 20 < forecast.clips_per_s < 1.1 * 4 / BATCH_S
    assert forecast.n_clips == 600
    assert forecast.n_measured < 600
    assert forecast.seconds == forecast.start_s + 600 / forecast.clips_per_s
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("changes", [{"stored_dtype": "int8"}, {"augment": MADE.augment}])
def test_quantised_banks_and_views_are_measured_too(
    clip_table: Path, tmp_path: Path, slow: None, changes: dict[str, Any]
) -> None:
    if isinstance(changes.get("augment"), AugmentSpec):
        changes = changes | {"n_views": 2}
    settings = replace(SETTINGS, n_threads=1, **changes)
    extraction = prepare(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=settings)
    forecast = measure(extraction, for_s=30.0)
    assert forecast.n_clips == extraction.plan.schema.n_clips >= N_CLIPS
    assert list(tmp_path.iterdir()) == []


def test_a_finished_bank_and_a_handful_of_clips_are_refused(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    done = prepare(clip_table, encoder="fake", out=sealed.path, settings=SETTINGS)
    with pytest.raises(PatchbankError, match="complete: there is nothing left to measure"):
        measure(done)
    table = write_clip_set(tmp_path / "set", n_clips=2)
    few = prepare(table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
    with pytest.raises(PatchbankError, match="2 clips are too few to measure with"):
        measure(few)


def test_a_growth_is_measured_by_the_clips_that_are_new(
    copy: Path, tmp_path: Path, slow: None
) -> None:
    seal = (copy / "seal.json").read_bytes()
    longer = write_clip_set(tmp_path / "set", n_clips=N_CLIPS + 40)
    extraction = prepare(longer, encoder="fake", out=copy, settings=SETTINGS)
    assert measure(extraction, for_s=0.5).n_clips == 40
    assert (copy / "seal.json").read_bytes() == seal


def test_the_command_tells_hours_and_wants_a_dry_run(
    clip_table: Path, tmp_path: Path, slow: None
) -> None:
    line = ["extract", str(clip_table), "--encoder", "fake", "--window-s", "1", "--threads", "1"]
    line += ["--out", str(tmp_path / "x.bank"), "--measure"]
    refused = CliRunner().invoke(app, line)
    assert refused.exit_code == 2
    assert "--measure goes with --dry-run" in refused.output
    told = CliRunner().invoke(app, [*line, "--dry-run"])
    assert told.exit_code == 0, told.output
    assert "clips/s" in told.stdout.splitlines()[-1]
    facts = json.loads(CliRunner().invoke(app, [*line, "--dry-run", "--json"]).stdout)
    forecast = facts["forecast"]
    assert forecast["hours"] == pytest.approx(
        (forecast["start_s"] + N_CLIPS / forecast["clips_per_s"]) / 3600
    )
    assert list(tmp_path.iterdir()) == []
