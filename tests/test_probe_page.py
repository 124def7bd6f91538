"""docs/probes.md: its examples keep the contract, its commands run, its tables are whole."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from patchbank.cli.main import main
from patchbank.probing.probes import PROBES, build_probe, find_build, plugin
from patchbank.probing.probes.base import ProbeShape, stacked_weights
from patchbank.probing.probes.checks import CHECKS
from patchbank.probing.probes.contract import check_probe
from patchbank.probing.probes.made_tokens import made_tokens
from patchbank.probing.probes.module import ModuleProbe
from patchbank.probing.probes.stacking import KNOWN
from patchbank.probing.randomness import generator

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = DOCS / "examples"
PAGE = (DOCS / "probes.md").read_text(encoding="utf-8")
SHAPE = ProbeShape(8, 3, 1)


def rows(header: str) -> list[list[str]]:
    """The cells of the table below a header line, which starts with that."""
    table = PAGE[PAGE.index(header) :].split("\n\n")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def test_the_page_has_every_probe_with_its_options() -> None:
    table = {cells[0].strip("`"): re.findall(r"`(\w+)`", cells[2]) for cells in rows("| name |")}
    assert list(table) == list(PROBES)
    assert table.pop("protofloat") == ["protobin"]
    shape = ProbeShape(24, 3, 1, (4, 3))
    stated = {name: list(build_probe(name, shape).options) for name in table}
    assert {name: sorted(options) for name, options in table.items()} == {
        name: sorted(options) for name, options in stated.items()
    }


def test_the_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in EXAMPLES.glob("*_probe.py"):
        shutil.copy(file, tmp_path)
    block = re.search(r"<!-- run by the tests -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    for program, *line in map(shlex.split, block[1].splitlines()):
        assert program == "patchbank"
        assert main(line) == 0, line
    said = capsys.readouterr().out
    assert "for dim 768, 50 classes" in said
    assert max(map(len, said.splitlines())) <= 80


def test_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert {"examples/gated_probe.py", "examples/stats_probe.py"} <= set(links)
    assert [link for link in links if not (DOCS / link).exists()] == []


def test_the_page_explains_every_check_in_order() -> None:
    assert [cells[0].strip("`") for cells in rows("| check |")] == [one.name for one in CHECKS]


def test_the_page_names_what_tokens_have_and_a_file_may_import() -> None:
    tokens = made_tokens(SHAPE)
    names = [name for cells in rows("| member |") for name in re.findall(r"`(\w+)`", cells[0])]
    assert len(names) == 8
    assert [name for name in names if not hasattr(tokens, name)] == []
    block = re.search(r"probes\.plugin import \(\n(.*?)\)", PAGE, re.DOTALL)
    assert block is not None
    assert set(re.findall(r"\w+", block[1])) == set(plugin.__all__)


def test_the_page_lists_why_trials_go_one_by_one() -> None:
    reasons = [cells[0] for cells in rows("| reason |")]
    assert sorted(reasons) == sorted([*KNOWN.values(), "torch cannot stack ..."])


@pytest.mark.parametrize("name", ["gated_probe", "stats_probe"])
def test_the_examples_keep_the_contract(name: str) -> None:
    stem, build = find_build(str(EXAMPLES / f"{name}.py"))
    results = check_probe(build, name=stem)
    assert {result.outcome for result in results} == {"passed"}
    assert "logits" in (build.function.__doc__ or "")  # type: ignore[attr-defined]


def test_the_module_is_stacked_and_weighs_patches_a_class() -> None:
    probe = build_probe(str(EXAMPLES / "gated_probe.py"), SHAPE)
    assert isinstance(probe, ModuleProbe)
    assert probe.note == "trials in one product"
    assert probe.options == {"dropout": 0.2}
    weights, tokens = stacked_weights(probe, "gated", [0, 1]), made_tokens(SHAPE)
    x = F.layer_norm(tokens.patches, (8,))
    logits = torch.zeros(3, 3)
    for c in range(3):
        share = (x @ weights["attention.weight"][1, c]).softmax(dim=1)
        heard = x @ weights["classes.weight"][1, c] + weights["classes.bias"][1, c]
        logits[:, c] = (share * heard).sum(dim=1)
    torch.testing.assert_close(probe.logits(weights, tokens)[1], logits)


def test_the_native_probe_sees_mean_and_deviation() -> None:
    path = str(EXAMPLES / "stats_probe.py")
    probe, tokens = build_probe(path, SHAPE), made_tokens(SHAPE, n_patches=[12, 5, 2])
    weights = stacked_weights(probe, "stats", [0, 1])
    seen = tokens.patches[1, :5]
    vector = torch.cat([seen.mean(dim=0), seen.std(dim=0, correction=0)])
    expected = weights["weight"][1] @ vector + weights["bias"][1]
    torch.testing.assert_close(probe.logits(weights, tokens)[1, 1], expected)
    dropping = build_probe(path, SHAPE, {"dropout": 0.5})
    randoms = [generator("stats", trial) for trial in range(2)]
    assert not torch.equal(
        dropping.logits(weights, tokens, dropout=randoms), dropping.logits(weights, tokens)
    )
    with pytest.raises(plugin.TrialError, match="found dropout=1, expected at least 0 and below 1"):
        build_probe(path, SHAPE, {"dropout": 1})
