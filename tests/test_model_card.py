"""README.md of a probe's folder, and what a run stores beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from needle_sets import NeedleBank, clip_table, needle_tokens
from sklearn.metrics import f1_score, log_loss

from patchbank.pipeline.encoders.catalogue import ENCODERS
from patchbank.probing.artefact import ProbeArtefact, load_probe
from patchbank.probing.calibration import HIGHEST_TEMPERATURE
from patchbank.probing.evaluation import Fold
from patchbank.probing.groups import read_groups
from patchbank.probing.labels import read_labels
from patchbank.probing.model_card import MOST_CLASSES, NEEDS_NO_FILE, model_card
from patchbank.probing.probes.base import ProbeShape
from patchbank.probing.protocol import train
from patchbank.probing.run import run_training
from patchbank.probing.run_files import FinishedRun, write_run
from patchbank.probing.settings import SearchSettings, TrainSettings
from patchbank.probing.splits import read_splits

SETTINGS = TrainSettings(
    n_epochs=3, n_seeds=2, search=SearchSettings(n_candidates=1), n_resamples=100, device="cpu"
)
SPLITS = [("train", "train", "valid", "test")[clip % 4] for clip in range(120)]


def table_of(folder: Path, bank: NeedleBank, targets: np.ndarray) -> Path:
    rows = ["clip_id,labels"]
    for name, row in zip(bank.clips["clip_id"].to_pylist(), targets, strict=True):
        rows.append(f"{name},{';'.join(f'class{one}' for one in np.flatnonzero(row))}")
    path = folder / "labels.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A run on needles, and tokens and targets of its validation clips."""
    folder = tmp_path_factory.mktemp("run")
    tokens, targets = needle_tokens(120)
    targets[:, 0] = 1
    targets[2::4, 3] = 0
    card = {"encoder": {"name": "needle"}, "window": {"window_s": 10.0}, "licence": "CC BY-NC 4.0"}
    paths = [f"{clip}.wav" for clip in range(120)]
    bank = NeedleBank(clip_table(120, split=SPLITS, path=paths), tokens, card=card)
    labels = table_of(folder, bank, targets)
    command = ["patchbank", "train-probe", "my bank", "--out", "run"]
    run_training(
        bank,
        labels,
        folder / "run",
        probes=["mhca"],
        settings=SETTINGS,
        source=bank.source,
        command=command,
    )
    return folder / "run/mhca", tokens[2::4].numpy(), targets[2::4]


def test_a_run_stores_what_validation_clips_chose(
    run: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    folder, tokens, targets = run
    probe = load_probe(folder)
    found = probe.predict_proba(tokens)
    facts = probe.validation
    assert facts["n_clips"] == 30
    assert facts["nll_after"] == pytest.approx(log_loss(targets.ravel(), found.ravel()), rel=1e-4)
    plain = replace(probe, temperature=1.0).predict_proba(tokens)
    assert facts["nll_before"] == pytest.approx(log_loss(targets.ravel(), plain.ravel()), rel=1e-4)
    assert facts["nll_after"] <= facts["nll_before"]
    assert probe.temperature != 1
    assert (probe.default_thresholds, probe.thresholds[3]) == (("class3",), 0.5)
    reached = f1_score(targets, probe.decide(found), average=None, zero_division=0)
    assert facts["f1"][:3] == pytest.approx(reached[:3].tolist())
    assert facts["f1"][3] is None


def test_a_run_stores_how_it_was_trained(run: tuple[Path, np.ndarray, np.ndarray]) -> None:
    training = load_probe(run[0]).training
    assert training["bank"] == "f" * 64
    assert training["recipe_id"] == "d" * 64
    assert training["settings"] == json.loads(json.dumps(asdict(SETTINGS)))
    assert training["environment"]["device"] == "cpu"
    for package in ("scipy", "optuna", "torch"):
        assert training["environment"][package] == version(package)
    assert training["command"] == ["patchbank", "train-probe", "my bank", "--out", "run"]
    assert set(training) == {
        "bank", "recipe_id", "fold", "learning_rate", "weight_decay", "seed", "valid_score",
        "settings", "environment", "command",
    }  # fmt: skip


def test_the_card_has_a_header_that_hubs_read(run: tuple[Path, np.ndarray, np.ndarray]) -> None:
    text = (run[0] / "README.md").read_text(encoding="utf-8")
    _, header, _ = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "patchbank",
        "pipeline_tag": "audio-classification",
        "tags": ["audio-classification", "patchbank", "probe"],
        "license": "cc-by-nc-4.0",
        "metrics": ["map_macro", "map_micro", "auroc_macro", "d_prime", "lwlrap"],
    }


def test_the_card_says_what_the_run_found(run: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder = run[0]
    probe, text = load_probe(folder), (folder / "README.md").read_text(encoding="utf-8")
    results = json.loads((folder.parent / "results.json").read_text())
    [row] = [
        row for row in results["scores"] if (row["split"], row["metric"]) == ("test", "map_macro")
    ]
    for stated in (
        "# mhca",
        "any number of 4 classes",
        "`needle`, layer 2",
        f"| test | map_macro | {row['mean']:.4f} | {row['std']:.4f} |",
        "| 30 | 2 |",
        f"T = {probe.temperature:.4g}",
        f"{probe.validation['nll_before']:.4f} at T = 1",
        f"| class1 | {probe.thresholds[1]:.4f} | {probe.validation['f1'][1]:.3f} |",
        "| class3 | 0.5000 | not chosen: no validation clip has it |",
        "1 classes have the default threshold 0.5",
        "patchbank train-probe 'my bank' --out run",
        '"n_epochs": 3',
        "The asymmetric loss trained it",
    ):
        assert stated in text
    assert str(folder.parent) not in text


def test_folds_choose_on_the_saved_folds_validation_clips(tmp_path: Path) -> None:
    tokens, targets = needle_tokens(90, multi_label=False)
    bank = NeedleBank(clip_table(90, fold=[clip % 3 for clip in range(90)]), tokens)
    labels = read_labels(table_of(tmp_path, bank, targets), bank.clips)
    folds = []
    for split in read_splits(bank.clips, usable=labels.known, folds="fold"):
        outcomes = train(
            bank.source([2]),
            labels.targets,
            split,
            probes=["linear"],
            multi_label=False,
            settings=SETTINGS,
        )
        folds.append(Fold(split, outcomes))
    write_run(
        FinishedRun(bank, labels, tuple(folds), SETTINGS, read_groups(bank.clips), {}),
        tmp_path / "run",
    )
    probe = load_probe(tmp_path / "run/linear")
    [split] = [fold.split for fold in folds if fold.split.name == probe.training["fold"]]
    found = probe.predict_proba(tokens[split.valid])
    expected = log_loss(labels.targets[split.valid].argmax(axis=1), found)
    assert probe.validation["nll_after"] == pytest.approx(expected, rel=1e-4)
    assert (probe.thresholds, probe.training["command"]) == ((), [])
    text = (tmp_path / "run/linear/README.md").read_text()
    assert "The decision is the likeliest class." in text
    assert "Trained from Python." in text
    assert f"among the folds, `{probe.training['fold']}`" in text
    assert "The asymmetric loss" not in text


def test_names_that_would_break_a_table_or_a_header_do_not() -> None:
    classes = ("cat|dog\nowl", *(f"c{index}" for index in range(MOST_CLASSES)))
    n = len(classes)
    probe = ProbeArtefact(
        probe="mine",
        options={},
        classes=classes,
        multi_label=True,
        shape=ProbeShape(4, n),
        weights={},
        temperature=HIGHEST_TEMPERATURE,
        thresholds=(0.5,) * n,
        validation={"n_clips": 3, "nll_before": 1.0, "nll_after": 0.5, "f1": [1.0] * n},
        plugin_sha256="a" * 64,
    )
    licence = 'Free: for "research", and nothing else at all'
    card = model_card(probe, name="mine", results={"scores": [], "left_out": []}, licence=licence)
    assert "| cat\\|dog owl | 0.5000 | 1.000 |" in card
    assert "1 more classes are in `probe.json`" in card
    assert "This T is a bound of the search" in card
    assert "--plugin FILE.py" in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["license"], header["license_name"]) == ("other", licence)


HOSTILE = (
    "x\n\n# Owned\r<script>alert(1)</script> <!-- `|` [a](javascript:b) ![c](d) **e** _f_ | g |"
    "\x1b[2J\u2028--- \\| `` ``` ~~h~~ &lt; $i$"
)


def hostile_card() -> str:
    bad = HOSTILE
    probe = ProbeArtefact(
        probe=bad,
        options={bad: bad},
        classes=(bad, "dog"),
        multi_label=True,
        shape=ProbeShape(4, 2),
        weights={},
        layers=(3,),
        encoder_id=bad,
        encoder={"name": bad, "weights_sha256": bad},
        thresholds=(0.5, 0.5),
        validation={"n_clips": 3, "nll_before": 1.0, "nll_after": 0.5, "f1": [1.0, 1.0]},
        plugin_sha256=bad,
        training={
            "bank": bad,
            "recipe_id": bad,
            "fold": bad,
            "command": ["patchbank", f"```\n{bad}"],
            "settings": {"loss": bad},
        },
    )
    results = {"scores": [], "left_out": [{"split": "test", "classes": [bad]}]}
    return model_card(probe, name=bad, results=results, licence=bad)


def test_no_name_or_value_becomes_markup() -> None:
    _, header, body = hostile_card().split("---\n", 2)
    licence = yaml.safe_load(header)["license_name"]
    assert licence == " ".join(HOSTILE.replace("\x1b", " ").split())
    blocks = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    inside = [one for block in blocks for one in block.children or ()]
    kinds = {one.type for one in [*blocks, *inside]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "strong_open"}
    assert not kinds & {"s_open", "hr", "hardbreak"}
    assert [one.tag for one in blocks if one.type == "heading_open"] == ["h1"] + 5 * ["h2"]
    assert "\x1b" not in body.split("## Training")[0]
    # Eight facts and the empty header of two cells; seven cells of scores; three rows of classes.
    n_cells = sum(one.type in ("td_open", "th_open") for one in blocks)
    assert n_cells == 2 * 9 + 7 + 3 * 3
    shown = " ".join(HOSTILE.replace("\x1b", " ").split())
    texts = ["".join(one.content for one in block.children or ()) for block in blocks]
    assert sum(shown in text for text in texts) >= 10
    [command, facts] = [one.content for one in blocks if one.type == "fence"][2:]
    assert HOSTILE.replace("\r", "\n") in command
    assert json.loads(facts)["fold"] == HOSTILE


@pytest.mark.parametrize(
    ("encoder", "weights", "says_encoder"),
    [
        ({"name": "tiny", "weights_sha256": "b" * 64}, False, False),
        ({"name": "logmel", "weights_sha256": ""}, False, False),
        ({"name": "beats", "weights_sha256": "b" * 64}, True, True),
        ({"name": "mine", "weights_sha256": ""}, False, True),
    ],
)
def test_the_cards_commands_name_the_files_that_they_need(
    encoder: dict[str, str], weights: bool, says_encoder: bool
) -> None:
    probe = ProbeArtefact(
        "linear",
        {},
        ("cat", "dog"),
        False,
        ProbeShape(4, 2),
        {},
        encoder=encoder,
        validation={"n_clips": 3, "nll_before": 1.0, "nll_after": 0.5},
    )
    card = model_card(probe, name="linear", results={"scores": [], "left_out": []})
    assert ("--out labels/ --weights FILE\n" in card) == weights
    assert ('Predictor(".", weights="FILE")' in card) == weights
    assert (f"FILE is the checkpoint of `{encoder['name']}`; its sha256 is `bbb" in card) == weights
    assert ("`--encoder FILE.py` as well" in card) == says_encoder


def test_encoders_that_need_no_file_are_those_of_the_catalogue() -> None:
    assert {name for name, one in ENCODERS.items() if not one.weights} == set(NEEDS_NO_FILE)
