"""Probes of installed packages and of files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fake_packages import Install, write

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank
from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes import build_probe, find_build
from patchbank.probing.probes.base import ProbeShape, n_parameters
from patchbank.probing.probes.probe_files import file_sha256

GROUP = "patchbank.probes"
SHAPE = ProbeShape(24, 3)
MINE = """
from patchbank.probing.probes.linear import build_linear

def build(shape, options):
    return build_linear(shape, options)
"""


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside one test's file is not taken for what lies beside another's."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "beside_probe", raising=False)


@pytest.fixture
def mine(install: Install) -> Install:
    write(install("desk", {"mine": "desk_probe"}, group=GROUP) / "desk_probe.py", MINE)
    return install


def test_an_entry_point_is_a_module_or_a_function(install: Install) -> None:
    points = {"mine": "desk_probe_a", "twin": "desk_probe_a:build"}
    write(install("desk", points, group=GROUP) / "desk_probe_a.py", MINE)
    assert build_probe("mine", SHAPE) == build_probe("twin", SHAPE) == build_probe("linear", SHAPE)


def test_an_installed_probe_trains_and_predicts(
    mine: Install,
    sealed: Bank,
    clip_table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, labels = str(tmp_path / "run"), str(clip_table.parent / "labels.csv")
    line = ["train-probe", str(sealed.path), "--labels", labels, "--out", run, "--probe", "mine"]
    assert main([*line, "--epochs", "2", "--seeds", "1"]) == 0
    assert main(["predict", run, "--bank", str(sealed.path)]) == 0
    (mine.folder / "desk-1.2.dist-info" / "entry_points.txt").unlink()
    capsys.readouterr()
    assert main(["predict", run, "--bank", str(sealed.path)]) == 1
    assert "found probe 'mine', expected one of" in capsys.readouterr().err


def test_a_shipped_name_keeps_its_meaning(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("desk", {"linear": "desk_none", "mine": "desk_none"}, group=GROUP)
    assert build_probe("linear", SHAPE).shape == SHAPE
    assert main(["probes"]) == 0
    said = capsys.readouterr().out
    assert "from desk 1.2; hidden by the shipped probe" in said
    assert max(map(len, said.splitlines())) <= 80


MODULE = """
from beside_probe import head

def build(shape, options):
    return head(shape.dim, shape.n_classes)
"""
BESIDE = """
from torch import nn

class head(nn.Linear):
    def forward(self, tokens):
        return super().forward(tokens.mean)
"""


def test_a_file_is_found_by_its_path_and_named_by_its_stem(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", MINE)
    name, build = find_build(str(path))
    assert name == "mine"
    assert build(SHAPE, {}) == build_probe(str(path), SHAPE) == build_probe("linear", SHAPE)


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "beside_probe.py", BESIDE)
    probe = build_probe(str(write(tmp_path / "mine.py", MODULE)), SHAPE)
    assert n_parameters(probe) == 75


def test_a_file_that_has_changed_is_run_again_and_otherwise_once(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", MINE)
    first = find_build(str(path))
    assert find_build(str(path)) == first
    before = file_sha256(path)
    write(path, MINE.replace("build_linear", "build_linear_cls"))
    assert find_build(str(path)) != first
    assert build_probe(str(path), ProbeShape(24, 3, 1)).uses_prefix
    assert (len(before), file_sha256(path) != before) == (64, True)


def test_files_of_one_name_in_two_folders_do_not_meet(tmp_path: Path) -> None:
    one = write(tmp_path / "a" / "mine.py", MINE)
    other = write(tmp_path / "b" / "mine.py", MINE.replace("build_linear", "build_linear_cls"))
    shape = ProbeShape(24, 3, 1)
    assert [build_probe(str(path), shape).uses_prefix for path in (one, other)] == [False, True]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nbuild = (", r"cannot import \S*mine\.py: \S*mine\.py:2: '\(' was never closed"),
        ("\nimport no_such_package", r"mine\.py:2: ModuleNotFoundError: No module named 'no_such"),
        ("def bild(shape, options): ...", r"mine\.py has no build\(shape, options\), expected"),
        ("def build(shape, options):\n    return {}['x']", r"failed: \S*mine\.py:2: KeyError: 'x'"),
        ("def build(): ...", r"build\(\) of \S*mine\.py failed: TypeError"),
    ],
)
def test_a_file_that_is_no_probe_is_one_clear_error(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", text)
    with pytest.raises(TrialError, match=words):
        build_probe(str(path), SHAPE)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrialError, match=r"no probe file at /\S*/none\.py .*give the path"):
        build_probe("none.py", SHAPE)
    monkeypatch.chdir(write(tmp_path / "mine.py", MINE).parent)
    with pytest.raises(TrialError, match=r"found probe 'mine', .*; did you mean 'mine\.py'\?"):
        build_probe("mine", SHAPE)


def test_a_file_may_not_take_the_name_of_another_probe(install: Install, tmp_path: Path) -> None:
    install("desk", {"mine": "desk_none"}, group=GROUP)
    for stem, owner in (("linear", "a shipped probe"), ("mine", r"desk 1\.2")):
        path = write(tmp_path / f"{stem}.py", "raise RuntimeError('run')")
        with pytest.raises(TrialError, match=f"name '{stem}' is that of {owner}; rename the file"):
            build_probe(str(path), SHAPE)


def test_the_list_imports_nothing_and_one_is_told_of(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(install("desk", {"mine": "desk_trip"}, group=GROUP) / "desk_trip.py", "raise OSError")
    assert main(["probes"]) == 0
    assert "mine" in capsys.readouterr().out
    write(tmp_path / "beside_probe.py", BESIDE)
    path = str(write(tmp_path / "own.py", MODULE))
    assert main(["probes", path, "--dim", "8", "--classes", "2"]) == 0
    said = capsys.readouterr().out
    assert "No description." in said
    assert "parameters   18 for dim 8, 2 classes" in said
    assert "note         trials in one product" in said
    assert main(["probes", "protobin", "--classes", "10"]) == 0
    said = capsys.readouterr().out
    assert "logits = W dropout(s) + b" in said
    assert "n_prototypes_per_class = 20, dropout = 0.2" in said
    assert "parameters   155,610 for dim 768, 10 classes" in said
    assert max(map(len, said.splitlines())) <= 80
    assert main(["probes", "protobn"]) == 1
    assert "did you mean 'protobin'?" in capsys.readouterr().err
    assert main(["probes", "linear", "--grid", "8"]) == 2
    assert "--grid takes TIMExFREQ, such as 64x8, found '8'" in capsys.readouterr().err


def test_what_cannot_be_used_says_which_package_it_is_of(install: Install) -> None:
    points = {"shaky": "desk_no_such_module", "empty": "desk_empty"}
    write(install("desk", points, group=GROUP) / "desk_empty.py", "")
    install("chair", {"both": "a"}, group=GROUP)
    install("table", {"both": "b"}, group=GROUP)
    with pytest.raises(TrialError, match=r"of desk 1\.2 cannot be imported from desk_no_such"):
        build_probe("shaky", SHAPE)
    with pytest.raises(TrialError, match=r"desk_empty of desk 1\.2 has no build"):
        build_probe("empty", SHAPE)
    with pytest.raises(TrialError, match=r"'both' is offered by chair 1\.2 and table 1\.2"):
        build_probe("both", SHAPE)
