"""Probes of installed packages."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_packages import Install, write

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank
from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import ProbeShape

GROUP = "patchbank.probes"
SHAPE = ProbeShape(24, 3)
MINE = """
from patchbank.probing.probes.linear import build_linear

def build(shape, options):
    return build_linear(shape, options)
"""


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
