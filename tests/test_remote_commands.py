"""`train-probe`, `predict` and `bank show` of a bank that lies elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from flaky_store import Behaviour, flaky

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank
from patchbank.pipeline.sharing.row_cache import cached_banks

__all__ = ["flaky"]
QUICK = ["--probe", "linear", "--epochs", "2", "--seeds", "1", "--lr", "0.01", "--device", "cpu"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATCHBANK_SETTINGS", str(tmp_path / "no-settings.toml"))
    return tmp_path / "cache"


def train(bank: str, clip_table: Path, out: Path) -> int:
    labels = clip_table.parent / "labels.csv"
    return main(["train-probe", bank, "--labels", str(labels), "--out", str(out), *QUICK])


def test_training_and_labels_are_those_of_the_bank_itself(
    sealed: Bank,
    copy: Path,
    clip_table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = f"file://{copy}?signature=secret"
    assert train(secret, clip_table, tmp_path / "afar") == 0
    said = capsys.readouterr()
    assert "tokens from ram: 320 KiB fit into half of" in said.err
    assert "from afar through the cache on this disk" in said.err
    assert train(str(sealed.path), clip_table, tmp_path / "here") == 0
    runs = [tmp_path / "afar", tmp_path / "here"]
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    for one in results:
        assert [scored.pop("utc") for scored in one["test_scored"]]
    assert results[0] == results[1]
    weights = [(run / "linear/probe.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    command = json.loads((runs[0] / "linear/probe.json").read_text())["training"]["command"]
    assert command[1:3] == ["train-probe", f"file://{copy}"]
    written = [path for place in (runs[0], tmp_path / "cache") for path in place.rglob("*")]
    assert not [path for path in written if path.is_file() and b"secret" in path.read_bytes()]
    capsys.readouterr()
    tables = []
    for run, bank in zip(runs, (secret, str(sealed.path)), strict=True):
        assert main(["predict", str(run), "--bank", bank, "--format", "csv"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert tables[0].count("\n") == sealed.n_clips + 1


def test_show_says_the_same_and_fetches_no_tokens(
    sealed: Bank, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = []
    for bank in (f"file://{sealed.path}", str(sealed.path)):
        assert main(["bank", "show", bank, "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
    assert facts[0] == facts[1]
    assert not list(cache.glob("banks/*/layers"))
    [cached] = cached_banks(cache)
    assert (cached.root_sha256, cached.url) == (sealed.root_sha256, str(sealed.path))


def test_a_bank_that_was_replaced_stops_training_and_the_same_line_goes_on(
    copy: Path, clip_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(copy, tmp_path / "away.bank")
    assert train(f"file://{copy}", clip_table, tmp_path / "run") == 1
    assert capsys.readouterr().err == (
        f"error: no bank at {copy}: there is no seal.json; `patchbank bank ls` of the folder above "
        "lists what there is\n"
    )
    shutil.move(tmp_path / "away.bank", copy)
    assert train(f"file://{copy}", clip_table, tmp_path / "run") == 0


def test_a_store_that_is_gone_stops_training_and_the_same_line_goes_on(
    sealed: Bank,
    flaky: Behaviour,
    clip_table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bank, run = f"flaky://{sealed.path}", tmp_path / "run"
    flaky.answers = 20
    assert train(bank, clip_table, run) == 1
    said = capsys.readouterr().err
    assert said.endswith(f"error: {bank} does not answer; the same command goes on from here\n")
    assert not (run / "results.json").exists()
    flaky.answers = 10**9
    assert train(bank, clip_table, run) == 0
    assert train(str(sealed.path), clip_table, tmp_path / "here") == 0
    weights = [(one / "linear/probe.safetensors").read_bytes() for one in (run, tmp_path / "here")]
    assert weights[0] == weights[1]
