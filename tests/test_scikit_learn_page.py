"""docs/scikit-learn.md: its examples run, its tables are whole."""

from __future__ import annotations

import csv
import inspect
import re
from pathlib import Path

import pytest
from audio_sets import write_clip_set
from test_estimator_checks import EXPECTED_FAILED_CHECKS, PARAMETERS, SLOWER

from patchbank.pipeline.bank.rows_view import RowsView
from patchbank.pipeline.extraction import ExtractionSettings, extract
from patchbank.pipeline.specs import WindowSpec
from patchbank.probing import ProbeClassifier
from patchbank.probing.probes import PROBES

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "scikit-learn.md").read_text(encoding="utf-8")


def rows(header: str) -> list[list[str]]:
    """The cells of the table below a header line."""
    table = PAGE[PAGE.index(header) :].split("\n\n")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def make_bank(folder: Path) -> None:
    """my.bank of 48 clips, each with a label, every two of them of one recording."""
    table = write_clip_set(folder / "set", n_clips=48)
    with table.open(newline="") as file:
        clips = [row["path"] for row in csv.DictReader(file)]
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "recording"])
        for index, path in enumerate(clips):
            writer.writerow([path, "low" if index // 4 % 2 == 0 else "high", f"r{index // 2}"])
    settings = ExtractionSettings(window=WindowSpec(1.0, 1.0))
    extract(table, encoder="fake", out=folder / "my.bank", settings=settings)


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_bank(tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"<!-- run by the tests -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```python") == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert len(names["scores"]) == 3  # type: ignore[arg-type]
    assert names["x"].shape == (48, 10, 12)  # type: ignore[attr-defined]
    assert names["classifier"].score(names["tokens"], names["is_loud"]) > 0.7  # type: ignore[attr-defined]


def test_the_page_has_every_parameter_with_its_default() -> None:
    stated = {
        name: cells[1].rsplit("(", 1)[1].rstrip(")").replace("None: by the task, `bce`", "None")
        for cells in rows("| parameter |")
        for name in re.findall(r"`(\w+)`", cells[0])
    }
    parameters = inspect.signature(ProbeClassifier).parameters
    assert list(stated) == list(parameters)
    for name, parameter in parameters.items():
        default = parameter.default
        if name in ("n_epochs", "batch_size"):
            assert stated[name] == "30, 64"
        elif isinstance(default, float):
            assert float(stated[name]) == default
        else:
            assert stated[name].split()[0].strip("`") == str(default)


def test_the_page_names_what_a_view_has() -> None:
    named = {name for cells in rows("| member |") for name in re.findall(r"`(\w+)`", cells[0])}
    public = {name for name in dir(RowsView) if not name.startswith("_")}
    assert named == public | {"bank", "layer", "rows"}


def test_the_page_argues_every_check_that_fails() -> None:
    table = {(cells[0].strip("`"), cells[1].strip("`")): cells[2] for cells in rows("| probe |")}
    assert table == {
        (probe, check): reason
        for probe, checks in EXPECTED_FAILED_CHECKS.items()
        for check, reason in checks.items()
    }
    assert set(PROBES) - set(PARAMETERS) - set(SLOWER) == {"linear-cls", "linearc"}


def test_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert [link for link in links if not (DOCS / link).exists()] == []
