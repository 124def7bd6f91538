from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import published_files
import pytest
import soundfile
import torch
from probe_weights import weights_of

from patchbank.cli.exported_model import BOUND, load_program, write_program
from patchbank.cli.main import main
from patchbank.cli.predictor import open_stream
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.errors import EncoderError
from patchbank.probing.artefact import ProbeArtefact, save_probe
from patchbank.probing.probes import PROBES, build_probe
from patchbank.probing.probes.base import ProbeShape
from patchbank.probing.probes.made_tokens import made_tokens
from patchbank.probing.probes.tokens import Tokens

READER = """
import json, sys
import torch

extra = {"patchbank.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
facts = json.loads(extra["patchbank.json"])
waveforms = torch.load(sys.argv[2])
assert waveforms.shape[1] == facts["n_samples"]
with torch.no_grad():
    found = [program(part).tolist() for part in waveforms.split([1, 3])]
assert not [name for name in sys.modules if name.startswith("patchbank")]
print(json.dumps({"classes": facts["classes"], "rows": found[0] + found[1]}))
"""
PLUGIN = """
import torch
from patchbank.pipeline.encoders.fake import FakeEncoder

class Odd(FakeEncoder):
    n_calls = 0

    def encode(self, features, layers=None):
        self.n_calls += 1
        {change}
        return super().encode(features, layers)

def load(weights, device):
    return Odd(weights, device)
"""


def artefact_of(
    encoder: Any, window_s: float, *, probe: str = "linear", dtype: str = "float16"
) -> ProbeArtefact:
    """An untrained probe with large weights on the last layer of `encoder`."""
    layer = encoder.spec.layers[-1]
    grid = encoder.grids(round(window_s * encoder.spec.sample_rate_hz))[layer.layer]
    shape = ProbeShape(layer.dim, 3, layer.n_prefix, (grid.time, grid.freq))
    family = build_probe(probe, shape)
    weights = {name: value[0] for name, value in weights_of(family, probe, [0]).items()}
    weights["weight"] = 10 * weights["weight"]
    return ProbeArtefact(
        probe=probe,
        options=family.options,
        classes=("cat", "dog", "owl"),
        multi_label=True,
        shape=shape,
        weights=weights,
        layers=(layer.layer,),
        encoder_id=encoder.spec.encoder_id,
        encoder=json.loads(json.dumps(encoder.spec.identity())),
        temperature=2.5,
        thresholds=(0.2, 0.5, 0.7),
        window={"window_s": window_s, "hop_s": window_s, "pad": "zero"},
        tokens={"stored_dtype": dtype, "mask_padding": False},
    )


def small_efficientat(folder: Path) -> Path:
    """mn04's shape at a width of 0.1, with random weights."""
    from patchbank.pipeline.encoders.efficientat_network import Network, stage_table

    network = Network(stage_table(0.1), head="mlp", head_dim=128, n_classes=527)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    state = published_files.random_state(shapes)
    for name, value in state.items():
        if name.endswith("running_var"):
            state[name] = value.abs() + 0.5
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
    torch.save(state, folder / "mn01.pt")
    return folder / "mn01.pt"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two probes trained on the bundled encoder's tokens of twelve seconds, with their audio."""
    folder = tmp_path_factory.mktemp("run")
    random, time_s = np.random.default_rng(0), np.arange(16_000) / 16_000
    clips, labels = ["path,split"], ["path,labels"]
    for index in range(12):
        tone = np.sin(2 * np.pi * (300, 900, 2_700)[index % 3] * time_s)
        waveform = 0.1 * (tone + 0.1 * random.standard_normal(16_000))
        soundfile.write(folder / f"{index}.wav", waveform, 16_000, subtype="FLOAT")
        clips.append(f"{index}.wav,{('train', 'train', 'valid', 'test')[index // 3]}")
        labels.append(f"{index}.wav,{('low', 'middle', 'high')[index % 3]}")
    (folder / "clips.csv").write_text("\n".join(clips))
    (folder / "labels.csv").write_text("\n".join(labels))
    bank, out = str(folder / "tiny.bank"), str(folder / "run")
    line = ["extract", str(folder / "clips.csv"), "--encoder", "tiny", "--window-s", "1"]
    assert main([*line, "--layers", "3,4", "--out", bank]) == 0
    line = ["train-probe", bank, "--labels", str(folder / "labels.csv"), "--out", out]
    line += ["--probe", "protobin", "--layer", "4,mix", "--sweep", "2"]
    assert main([*line, "--epochs", "10", "--seeds", "1", "--device", "cpu"]) == 0
    return folder


def test_a_program_gives_what_predict_gives_where_patchbank_is_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = "protobin@3+4"
    program, waves = tmp_path / "model.pt2", tmp_path / "waves.pt"
    line = ["export", str(run / "run"), "--probe", probe, "--out", str(program)]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "waveforms (batch, 16000) at 16000 Hz to (batch, 3)" in said
    assert "largest difference from predict" in said
    assert max(len(row) for row in said.splitlines()[1:]) <= 80
    paths = [run / f"{index}.wav" for index in (0, 4, 8, 11)]
    torch.save(
        torch.from_numpy(np.stack([soundfile.read(p, dtype="float32")[0] for p in paths])), waves
    )
    reader = [sys.executable, "-W", "ignore", "-c", READER, str(program), str(waves)]
    done = subprocess.run(reader, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    table = tmp_path / "scores.csv"
    line = ["predict", str(run / "run"), *map(str, paths), "--probe", probe]
    assert main([*line, "--out", str(table)]) == 0
    expected = list(csv.DictReader(table.read_text().splitlines()))
    assert len(expected) == 4
    best = [found["classes"][int(np.argmax(row))] for row in found["rows"]]
    assert best == ["low", "middle", "high", "high"]
    for row, wanted in zip(found["rows"], expected, strict=True):
        predicted = [float(wanted[name]) for name in found["classes"]]
        np.testing.assert_allclose(row, predicted, rtol=0, atol=2e-6)  # the table has six digits


def test_a_missing_folder_is_named_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "nodir/x.pt2"
    assert main(["export", str(tmp_path / "no run"), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert f"found no folder {out.parent} for x.pt2" in said
    assert f"make it: mkdir -p {out.parent}" in said


def test_a_program_says_what_it_is(run: Path, tmp_path: Path) -> None:
    program = tmp_path / "model.pt2"
    line = ["export", str(run / "run"), "--probe", "protobin@4", "--out", str(program)]
    assert main([*line, "--batch", "1"]) == 0
    module, facts = load_program(program)
    seal = json.loads((run / "tiny.bank/seal.json").read_text())
    assert facts["bank"] == seal["fingerprint"]
    assert facts["classes"] == ["high", "low", "middle"]
    assert (facts["sample_rate_hz"], facts["n_samples"]) == (16_000, 16_000)
    assert facts["encoder_id"] == load_encoder("tiny").spec.encoder_id
    assert module(torch.zeros(1, 16_000)).shape == (1, 3)
    with pytest.raises(RuntimeError, match="to be equal to 1, but got 2"):
        module(torch.zeros(2, 16_000))


@pytest.mark.parametrize(
    "name",
    [
        "efficientat",
        "beats",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("eat", "audiomae", "dasheng", "asit", "bird-mae", "bat", "sslam")
        ),
    ],
)
def test_published_encoders_can_be_exported(name: str, tmp_path: Path) -> None:
    layouts = {**published_files.LAYOUTS, "efficientat": {"file": small_efficientat}}
    weights = next(iter(layouts[name].values()))(tmp_path)
    encoder = load_encoder(name, weights=weights)
    window_s = {"efficientat": 2.0, "beats": 2.0, **published_files.NATURAL_S}.get(name, 10.0)
    artefact = artefact_of(encoder, window_s)
    stream = open_stream(artefact, weights=str(weights), encoder=None, device="cpu")
    check = write_program(artefact, stream, tmp_path / "model.pt2", any_batch=True)
    assert check.largest_difference <= check.bound == BOUND
    assert check.waveforms == ("noise", "silence", "tone", "sweep")
    assert check.batch_sizes == (1, 3)


def test_a_program_rounds_tokens_as_the_bank_did(tmp_path: Path) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        artefact = artefact_of(load_encoder("logmel"), 1.0, dtype=dtype)
        stream = open_stream(artefact, weights=None, encoder=None, device="cpu")
        check = write_program(artefact, stream, tmp_path / "model.pt2", any_batch=False)
        assert check.largest_difference < 2e-6
        module, facts = load_program(tmp_path / "model.pt2")
        assert facts["thresholds"] == [0.2, 0.5, 0.7]
        found.append(module(0.1 * torch.ones(1, 16_000).cumsum(1).sin()))
    assert (found[0] - found[1]).abs().max() > 1e-4


class OnTokens(torch.nn.Module):
    """A probe alone, on tokens of which all but the last two count."""

    def __init__(self, name: str, options: Mapping[str, Any], shape: ProbeShape) -> None:
        super().__init__()
        self.probe = build_probe(name, shape, options)
        self.weights = weights_of(self.probe, name, [0])

    def forward(self, patches: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        counts = torch.full((patches.shape[0],), patches.shape[1] - 2)
        return self.probe.logits(self.weights, Tokens(patches, prefix, counts))[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in PROBES),
        ("linpre", {"pooling": "lse"}),
        ("conv", {"pooling": "max"}),
    ],
)
def test_every_probe_can_be_exported_for_any_number_of_clips(
    name: str, options: dict[str, Any]
) -> None:
    shape = ProbeShape(8, 3, n_prefix=1, grid=(4, 2))
    model, batch = OnTokens(name, options, shape), {0: torch.export.Dim("batch", min=1)}
    with torch.no_grad():
        two = made_tokens(shape, n_clips=2)
        program = torch.export.export(
            model, (two.patches, two.prefix), dynamic_shapes=(batch, batch), strict=False
        ).module()
        for n_clips in (1, 5):
            some = made_tokens(shape, n_clips=n_clips, seed=1)
            expected = model(some.patches, some.prefix)
            torch.testing.assert_close(
                program(some.patches, some.prefix), expected, rtol=1e-5, atol=1e-6
            )


def plugin_artefact(folder: Path, change: str) -> tuple[ProbeArtefact, str]:
    path = folder / "odd.py"
    path.write_text(PLUGIN.format(change=change))
    return artefact_of(load_encoder(str(path)), 1.0), str(path)


@pytest.mark.parametrize(
    ("change", "any_batch", "reason"),
    [
        ("features = torch.from_numpy(features.numpy() + 0)", False, r"odd\.py:\d+\); use patchb"),
        ("if features.sum() > 0: features = -features", False, r"data-dependent.*odd\.py:"),
        ("features = torch.stack([features[i] for i in range(len(features))])", True, "--batch 1"),
    ],
)
def test_what_cannot_be_exported_says_why(
    change: str, any_batch: bool, reason: str, tmp_path: Path
) -> None:
    artefact, path = plugin_artefact(tmp_path, change)
    stream = open_stream(artefact, weights=None, encoder=path, device="cpu")
    with pytest.raises(EncoderError, match="cannot export fake with probe 'linear'") as caught:
        write_program(artefact, stream, tmp_path / "model.pt2", any_batch=any_batch)
    assert re.search(reason, str(caught.value)), caught.value
    assert [one.name for one in tmp_path.glob("*.pt2")] == []


def test_a_program_that_differs_from_predict_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artefact, path = plugin_artefact(tmp_path, "features = features * self.n_calls")
    (tmp_path / "run").mkdir()
    save_probe(tmp_path / "run", artefact)
    out = tmp_path / "model.pt2"
    out.write_text("older")
    line = ["export", str(tmp_path / "run"), "--encoder", path, "--out", str(out)]
    assert main(line) == 1
    said = capsys.readouterr().err
    assert "the exported program differs from predict by" in said
    assert "use patchbank predict" in said
    assert out.read_text() == "older"
    assert list(tmp_path.glob(".*")) == []


def test_programs_are_named_pt2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run / "run"), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "ends in .pt2" in " ".join(capsys.readouterr().err.split())


def test_the_page_has_every_option_and_says_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs/export.md").read_text("utf-8")
    assert main(["export", "--help"]) == 0
    known = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help"}
    table = page[page.index("| option |") :].split("\n\n")[0]
    assert set(re.findall(r"--[a-z]+", table)) == known
    assert f"Above {BOUND:.0e}".replace("e-0", "e-") in page
