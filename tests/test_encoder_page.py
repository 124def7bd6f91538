"""docs/encoders.md: its examples keep the contract, its commands run, its tables are whole."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_sets import write_clip_set, write_tone

from patchbank.cli.main import main
from patchbank.pipeline.encoders import load_encoder, plugin
from patchbank.pipeline.encoders.base import Encoder
from patchbank.pipeline.encoders.checks import CHECKS
from patchbank.pipeline.encoders.contract import check_encoder
from patchbank.pipeline.encoders.discovery import MEMBERS

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = DOCS / "examples"
PAGE = (DOCS / "encoders.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    block = re.search(r"<!-- run by the tests -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    return [shlex.split(line) for line in block[1].splitlines()]


def test_the_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    write_clip_set(tmp_path, n_clips=16)
    write_tone(tmp_path / "new.wav", hertz=210, duration_s=2.0)
    for file in EXAMPLES.glob("*.py"):
        shutil.copy(file, tmp_path)
    for program, *line in commands():
        assert program == "patchbank"
        assert main(line) == 0, line
    assert "new.wav  1.0-2.0 s" in capsys.readouterr().out


def test_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert {"examples/ast_encoder.py", "examples/conv_encoder.py"} <= set(links)
    assert [link for link in links if not (DOCS / link).exists()] == []


def test_the_page_explains_every_check_in_order() -> None:
    table = PAGE[PAGE.index("| check |") : PAGE.index("## In a package")]
    assert re.findall(r"^\| `([a-z]+)` \|", table, re.MULTILINE) == [check.name for check in CHECKS]


def test_the_page_names_what_a_plugin_has_and_may_import() -> None:
    table = PAGE[PAGE.index("| member |") : PAGE.index("`patches` is")]
    assert re.findall(r"^\| `(\w+)", table, re.MULTILINE) == list(MEMBERS)
    block = re.search(r"encoders\.plugin import \(\n(.*?)\)", PAGE, re.DOTALL)
    assert block is not None
    assert set(re.findall(r"\w+", block[1])) == set(plugin.__all__)


@pytest.fixture(scope="module")
def ast() -> Encoder:
    pytest.importorskip("transformers")
    return load_encoder(str(EXAMPLES / "ast_encoder.py"))


def test_ast_follows_the_published_front_end(ast: Encoder) -> None:
    """The same numbers as the feature extractor that the checkpoint is published with."""
    from transformers import ASTFeatureExtractor

    waveform = torch.from_numpy(
        np.random.default_rng(0).uniform(-0.5, 0.5, (1, 80_000)).astype(np.float32)
    )
    extractor = ASTFeatureExtractor()
    published = extractor(waveform[0].numpy(), sampling_rate=16_000, return_tensors="pt")
    torch.testing.assert_close(
        ast.frontend(waveform), published["input_values"], rtol=1e-4, atol=1e-4
    )


def test_ast_puts_each_patch_where_the_model_has_it(ast: Encoder) -> None:
    features = ast.frontend(torch.zeros(1, 160_000) + 0.01)
    tokens = ast.encode(features, [2])[2]
    model = ast.model  # type: ignore[attr-defined]
    flat = model(features).last_hidden_state
    assert (tokens.grid.time, tokens.grid.freq) == (101, 12)
    for time, freq in ((0, 0), (0, 11), (7, 3), (100, 11)):
        mine = tokens.patches[0, time * 12 + freq]
        assert torch.equal(mine, flat[0, 2 + freq * 101 + time])
    assert tokens.prefix is not None
    assert torch.equal(tokens.prefix, flat[:, :2])


def test_ast_takes_a_folder_of_weights(ast: Encoder, tmp_path: Path) -> None:
    ast.model.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    path = str(EXAMPLES / "ast_encoder.py")
    other = load_encoder(path, weights=tmp_path)
    assert len(other.spec.weights_sha256) == 64
    assert other.spec.config == ast.spec.config
    features = ast.frontend(torch.zeros(1, 16_000))
    same = torch.equal(other.encode(features)[1].patches, ast.encode(features)[1].patches)
    assert same


def test_the_convolutional_example_takes_a_state_dict(tmp_path: Path) -> None:
    path = str(EXAMPLES / "conv_encoder.py")
    plain = load_encoder(path)
    torch.save(plain.network.state_dict(), tmp_path / "w.pt")  # type: ignore[attr-defined]
    results = check_encoder(
        lambda: load_encoder(path, weights=tmp_path / "w.pt"), reference=path, window_s=3.0
    )
    assert {result.outcome for result in results} == {"passed"}
