"""Defaults, presets, files and flags of a training run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank
from patchbank.pipeline.errors import TrialError
from patchbank.probing.settings import SearchSettings, TrainSettings
from patchbank.probing.train_options import PRESETS, TrainOptions

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/training.md").read_text(encoding="utf-8")
COMMAND = (ROOT / "cli/train.py").read_text(encoding="utf-8")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_are_those_of_the_settings() -> None:
    settings = TrainOptions.resolve({}).settings([1, 2])
    assert settings == TrainSettings()
    assert settings.search == SearchSettings()


def test_flags_lie_above_a_file_above_a_preset_above_the_defaults(tmp_path: Path) -> None:
    file = write(
        tmp_path / "study.toml",
        'preset = "unmute"\nseeds = 7\nsweep = 9\n[search]\nn_rounds = 1\n'
        "[search.learning_rates]\nlinear = [1e-3, 2e-3]\n",
    )
    options = TrainOptions.resolve({"seeds": 3, "loss": None, "probe": []}, file=file)
    assert (options.seeds, options.sweep, options.epochs, options.loss) == (3, 9, 30, "auto")
    assert options.batch_size == 128
    assert (options.search.first, options.search.n_rounds) == ("sobol", 1)
    assert options.search.learning_rates["linear"] == (1e-3, 2e-3)
    assert options.search.learning_rates["protobin"] == (2e-3, 8e-2)
    assert options.probe == ("linear", "protobin")
    other = TrainOptions.resolve({}, file=file, preset="bat")
    assert (other.steps, other.search.first, other.seeds) == (20_000, "spread", 7)


def test_what_says_the_same_in_another_way_gives_way() -> None:
    options = TrainOptions.resolve({"epochs": 3, "sweep": 4}, preset="bat")
    assert (options.steps, options.lr, options.weight_decay) == (None, (), ())
    assert options.warmup_steps == 500
    both = TrainOptions.resolve({"lr": [0.1], "epochs": 3}, preset="bat")
    assert (both.lr, both.weight_decay) == ((0.1,), (0.05,))


def test_paths_of_a_file_are_seen_from_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    text = f'labels = ["a.csv", "{tmp_path}/b.csv"]\nsplits = "../s.csv"\n'
    options = TrainOptions.resolve({}, file=write(tmp_path / "deep/x.toml", text))
    assert options.labels == (tmp_path / "deep/a.csv", tmp_path / "b.csv")
    assert options.splits == tmp_path / "deep/../s.csv"


@pytest.mark.parametrize("preset", [*PRESETS, None])
def test_what_is_written_down_means_the_same(tmp_path: Path, preset: str | None) -> None:
    flags = {"probe": ["mhca:n_heads=4", "linear"], "lr": [0.01], "folds": "fold"}
    options = TrainOptions.resolve(flags, preset=preset)
    file = write(tmp_path / "settings.toml", options.to_toml(tmp_path))
    assert TrainOptions.resolve({}, file=file) == options


def test_paths_of_what_is_written_down_are_those_that_were_meant(tmp_path: Path) -> None:
    labels, run = tmp_path / "tables/labels.csv", tmp_path / "runs/one"
    run.mkdir(parents=True)
    options = TrainOptions.resolve({"labels": [labels]})
    file = write(run / "settings.toml", options.to_toml(run))
    [found] = TrainOptions.resolve({}, file=file).labels
    assert found.resolve() == labels


def test_the_file_of_the_page_is_one(tmp_path: Path) -> None:
    block = re.search(r"<!-- read by the tests -->\n```toml\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    options = TrainOptions.resolve({}, file=write(tmp_path / "page.toml", block[1]))
    assert (options.batch_size, options.seeds, options.gamma_negative) == (128, 10, 2.0)
    assert options.search.halving_epochs == (5,)
    entries, layers = options.entries([1, 12])
    assert [dict(entry.options) for entry in entries] == [{}, {"dropout": 0.1}, {"n_heads": 8}]
    assert layers == [(12,)]


def test_the_page_names_every_option_that_has_no_flag() -> None:
    flags = set(re.findall(r'"(\w+)": ', COMMAND))
    text = PAGE[PAGE.index("Without a flag are") :].split("\n\n")[0]
    named = set(re.findall(r"`(?:\[)?(\w+)", text))
    assert set(TrainOptions.model_fields) - flags <= named


WRONG: dict[str, tuple[str, str]] = {
    "name": ("epoch = 3", r"wrong.toml: found 'epoch', expected an option.*did you mean 'epochs'"),
    "kind": ('seeds = "5"', "wrong.toml: seeds: found '5'; input should be a valid integer"),
    "choice": ('loss = "asym"', "wrong.toml: loss: found 'asym'; input should be 'auto'"),
    "table": ("[search]\nkep = 1", "found 'search.kep', expected.*did you mean 'keep'"),
    "pair": ("[search.learning_rates]\nlinear = [1.0]", r"search.learning_rates.linear"),
    "no TOML": ("epochs 3", "wrong.toml: Expected '=' after a key.*, expected TOML"),
    "preset": ('preset = "unmut"', "found preset 'unmut', expected one of.*mean 'unmute'"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_file_that_cannot_be_meant_says_why(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TrialError, match=message):
        TrainOptions.resolve({}, file=write(tmp_path / "wrong.toml", text))


def test_what_would_be_ignored_is_refused() -> None:
    with pytest.raises(TrialError, match="found both --lr and --sweep"):
        TrainOptions.resolve({"lr": [0.1], "sweep": 3})
    options = TrainOptions.resolve({"search": {"learning_rates": {"protobn": [1e-3, 1e-2]}}})
    with pytest.raises(TrialError, match=r"search\.learning_rates of probe 'protobn'"):
        options.entries([1])


def test_a_file_names_no_python_to_run(tmp_path: Path) -> None:
    file = write(tmp_path / "study.toml", 'probe = ["linear", "evil.py:dropout=0.1"]\n')
    with pytest.raises(TrialError, match=r"names a file of Python, evil\.py.*only you may"):
        TrainOptions.resolve({}, file=file)


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(TrialError, match=r"cannot read .*none\.toml"):
        TrainOptions.resolve({}, file=tmp_path / "none.toml")


def test_options_of_no_probe_are_refused() -> None:
    options = TrainOptions.resolve({"options": {"protbin": {"dropout": 0.1}}})
    with pytest.raises(TrialError, match=r"options of probe 'protbin'.*did you mean 'protobin'"):
        options.entries([1])


def test_a_run_from_a_file_leaves_the_file_that_repeats_it(
    sealed: Bank, clip_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, out = clip_table.parent / "labels.csv", tmp_path / "run"
    text = f'labels = ["{labels}"]\nprobe = ["linear"]\nseeds = 2\nepochs = 9\n'
    file = write(tmp_path / "study.toml", text + "[search]\nn_rounds = 1\nn_a_round = 2\n")
    line = ["train-probe", str(sealed.path), "--epochs", "2", "--sweep", "2", "--out"]
    assert main([*line, str(out), "--config", str(file)]) == 0
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert (results["settings"]["n_epochs"], results["settings"]["n_seeds"]) == (2, 2)
    assert len(results["probes"]["linear"]["search"][0]["candidates"]) == 4
    again = ["train-probe", str(sealed.path), "--config", str(out / "settings.toml")]
    capsys.readouterr()
    assert main([*again, "--out", str(out)]) == 0
    assert "nothing is left to do" in capsys.readouterr().err
    assert main(["train-probe", str(sealed.path), "--out", str(out)]) == 2
    assert "give a table of labels" in capsys.readouterr().err
