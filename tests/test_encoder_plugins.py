"""Encoders of one's own: from a file, from an installed package, through a whole job."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
from audio_sets import write_clip_set, write_tone
from distributed import LocalCluster
from fake_bank import SETTINGS
from fake_packages import Install, write
from killable import ENVIRONMENT

from patchbank.cli.main import main
from patchbank.pipeline.bank import open_bank
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.encoders.discovery import installed_encoders
from patchbank.pipeline.errors import BankMismatch, EncoderError
from patchbank.pipeline.extraction import extract, prepare
from patchbank.pipeline.shard import ShardExtractor

MINE = """
from dataclasses import replace
from patchbank.pipeline.encoders import fake

NAME = "mine"

def load(weights, device):
    encoder = fake.load(weights, device)
    encoder.spec = replace(encoder.spec, name=NAME, licence="CC BY-NC 4.0", source="my desk")
    return encoder
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return write(tmp_path / "mine.py", MINE)


def error_of(capsys: pytest.CaptureFixture[str], *line: object) -> str:
    capsys.readouterr()
    assert main(list(map(str, line))) == 1
    return capsys.readouterr().err


# Files.


def test_a_file_is_loaded_by_its_path(mine: Path) -> None:
    assert load_encoder(str(mine)).spec.name == "mine"


def test_a_file_may_import_what_lies_beside_it_but_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    write(tmp_path / "beside_encoder.py", "NAME = 'beside'")
    write(tmp_path / "colorsys.py", "raise ImportError('hidden')")
    text = "import colorsys\n" + MINE.replace('NAME = "mine"', "from beside_encoder import NAME")
    path = write(tmp_path / "mine.py", text)
    assert load_encoder(str(path)).spec.name == "beside"


def test_files_of_one_name_in_two_folders_do_not_meet(tmp_path: Path) -> None:
    names = []
    for folder in ("a", "b"):
        path = write(tmp_path / folder / "mine.py", MINE.replace('"mine"', f'"{folder}"'))
        names.append(load_encoder(str(path)))
    assert [encoder.spec.name for encoder in names] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nload = (", r"mine\.py:2: '\(' was never closed"),
        ("\nimport no_such_package", r"mine\.py:2: ModuleNotFoundError: No module named 'no_such"),
        ("def lod(weights, device): ...", r"mine\.py has no load\(weights, device\); an encoder"),
        ("load = 1", r"mine\.py has no load"),
        ("def load(weights, device):\n    return {}['x']", r"failed: \S*mine\.py:2: KeyError: 'x'"),
        ("def load(weights, device): ...", r"returned NoneType without spec, frontend, encode"),
        ("def load(): ...", r"load\(\) of \S*mine\.py failed: TypeError"),
    ],
)
def test_a_file_that_is_no_encoder_is_one_clear_error(
    text: str, words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "mine.py", text)
    with pytest.raises(EncoderError, match=words):
        load_encoder(str(path))


def test_what_a_plugin_says_itself_is_not_wrapped(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.py",
        "from patchbank.pipeline.encoders.plugin import EncoderError\n"
        "def load(weights, device): raise EncoderError('mine needs --weights')",
    )
    with pytest.raises(EncoderError, match=r"^mine needs --weights$"):
        load_encoder(str(path))


def test_an_unknown_name_says_what_there_is_and_what_is_near(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mine.parent)
    with pytest.raises(EncoderError, match=r"'mine' \(did you mean mine\.py\?\); there are: asit"):
        load_encoder("mine")
    with pytest.raises(EncoderError, match=r"\(did you mean tiny\?\).*such as my_encoder\.py"):
        load_encoder("tinny")
    with pytest.raises(EncoderError, match=r"no encoder file at /\S*/none\.py; give the path"):
        load_encoder("none.py")


# Installed packages.


def test_an_entry_point_is_a_module_or_a_function(install: Install) -> None:
    folder = install("desk", {"mine": "desk_module", "twin": "desk_module:load"})
    write(folder / "desk_module.py", MINE)
    assert load_encoder("mine").spec.name == load_encoder("twin").spec.name == "mine"
    found = [(one.name, one.distribution) for one in installed_encoders()]
    assert found == [("mine", "desk 1.2"), ("twin", "desk 1.2")]


def test_a_broken_package_breaks_only_its_own_encoder(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("broken", {"shaky": "no_such_module"})
    assert load_encoder("fake").spec.name == "fake"
    assert main(["encoders"]) == 0
    assert "from broken 1.2" in capsys.readouterr().out
    said = r"'shaky' of broken 1\.2 cannot be imported from no_such_module: ModuleNotFound.*repair"
    with pytest.raises(EncoderError, match=said):
        load_encoder("shaky")


def test_a_module_without_load_is_named(install: Install) -> None:
    folder = install("desk", {"empty": "desk_empty"})
    write(folder / "desk_empty.py", "")
    with pytest.raises(EncoderError, match="empty has no load"):
        load_encoder("empty")


def test_a_name_that_two_packages_offer_is_an_error_that_names_both(install: Install) -> None:
    install("desk", {"mine": "a", "tiny": "a"})
    install("chair", {"mine": "b"})
    with pytest.raises(EncoderError, match=r"'mine' is offered by chair 1\.2 and desk 1\.2, exp"):
        load_encoder("mine")
    with pytest.raises(EncoderError, match=r"'tiny' is offered by patchbank and desk 1\.2"):
        load_encoder("tiny")


def test_the_list_shows_installed_encoders_and_imports_nothing(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = install("desk", {"mine": "desk_tripwire"})
    write(folder / "desk_tripwire.py", "raise RuntimeError('imported')")
    assert main(["encoders", "--json"]) == 0
    facts = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert facts["mine"] == {"name": "mine", "distribution": "desk 1.2"}
    assert facts["efficientat"]["licence"] == "MIT"
    assert facts["efficientat"]["sample_rate_hz"] == 32_000
    assert facts["efficientat"]["weights"].startswith("https://")
    assert set(facts["tiny"]) >= {"grid", "dim", "n_layers", "notes", "summary", "distribution"}
    assert main(["encoders"]) == 0
    said = capsys.readouterr().out
    assert "32 kHz, 32 x 4 of 10 s, dim 384, 17 layers" in said
    assert "weights: github.com/fschmid56/EfficientAT" in said
    assert "patchbank check mine" in said
    assert max(map(len, said.splitlines())) <= 80


# A whole job.


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_set(tmp_path_factory.mktemp("set"), n_clips=16)


def test_a_file_goes_through_a_whole_job(
    mine: Path,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    bank = tmp_path / "x.bank"
    line = ["extract", str(table), "--encoder", "mine.py", "--out", str(bank), "--window-s", "1"]
    assert main(line) == 0
    # The same line finds nothing left to do.
    assert main(line) == 0
    assert main(["bank", "verify", str(bank), "--encoder", "mine.py"]) == 0
    capsys.readouterr()
    assert main(["bank", "show", str(bank)]) == 0
    said = capsys.readouterr().out
    assert "encoder      mine," in said
    assert "licence      CC BY-NC 4.0" in said
    assert "source       my desk" in said
    train = ["train-probe", str(bank), "--labels", str(table.parent / "labels.csv"), "--seeds", "1"]
    assert main([*train, "--probe", "linear", "--epochs", "1", "--out", "run"]) == 0
    write_tone(tmp_path / "new.wav", hertz=210)
    assert main(["predict", "run", "new.wav", "--encoder", "mine.py"]) == 0
    assert "new.wav" in capsys.readouterr().out
    assert main(["predict", "run", "--bank", str(bank)]) == 0
    said = error_of(capsys, "predict", "run", "new.wav")
    assert "tokens of 'mine', which is neither shipped nor installed here" in said
    assert "--encoder FILE.py" in said
    said = error_of(capsys, "predict", "run", "new.wav", "--encoder", "fake")
    assert "name: found 'fake', expected 'mine'" in said


def test_an_installed_encoder_needs_no_file_to_predict(
    install: Install, table: Path, tmp_path: Path
) -> None:
    write(install("desk", {"mine": "desk_job"}) / "desk_job.py", MINE)
    bank, run = str(tmp_path / "x.bank"), str(tmp_path / "run")
    line = ["extract", str(table), "--encoder", "mine", "--out", bank, "--window-s", "1"]
    assert main(line) == 0
    train = ["train-probe", bank, "--labels", str(table.parent / "labels.csv"), "--seeds", "1"]
    assert main([*train, "--probe", "linear", "--epochs", "1", "--out", run]) == 0
    assert main(["predict", run, str(table.parent / "audio/0000.wav")]) == 0


def test_a_file_that_has_changed_is_refused_by_its_own_bank(
    mine: Path, table: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "x.bank"
    extract(table, encoder=str(mine), out=bank, settings=SETTINGS)
    write(mine, MINE.replace('"mine"', '"other"'))
    with pytest.raises(BankMismatch, match=r"encoder\.name: found 'mine', expected 'other'"):
        extract(table, encoder=str(mine), out=bank, settings=SETTINGS)


# Workers.


def test_a_worker_in_another_folder_finds_the_file(
    mine: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mine.parent)
    extraction = prepare(table, encoder="mine.py", out=tmp_path / "x.bank", settings=SETTINGS)
    assert extraction.job.encoder == str(mine)
    monkeypatch.chdir("/")
    job = pickle.loads(pickle.dumps(extraction.job))
    ShardExtractor(job).close()
    write(mine, MINE.replace("NAME =", "NAME = 'other' #"))
    with pytest.raises(BankMismatch, match=r"mine\.py with no weights is another encoder here"):
        ShardExtractor(job)
    mine.unlink()
    with pytest.raises(EncoderError, match=r"finds no encoder at \S*mine\.py; every worker needs"):
        ShardExtractor(job)


def test_another_process_extracts_with_the_file(
    mine: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Dask sets these for the processes that it starts, and would leave them set.
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None
    ) as cluster:
        line = ["extract", str(table), "--encoder", "mine.py", "--out", "x.bank"]
        line += ["--window-s", "1", "--device", "cpu"]
        assert main([*line, "--scheduler", cluster.scheduler_address]) == 0
    assert open_bank(tmp_path / "x.bank").card["encoder"]["name"] == "mine"
