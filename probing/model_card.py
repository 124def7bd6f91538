"""README.md of a probe's folder: what somebody who is handed the folder needs to know.

Every sentence comes from a value of the run; the header is what model hubs read.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from patchbank.pipeline.bank.markdown import code, code_block, escaped, one_line
from patchbank.probing.artefact import ProbeArtefact
from patchbank.probing.calibration import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from patchbank.probing.thresholds import DEFAULT_THRESHOLD

NEEDS_NO_FILE = ("fake", "logmel", "tiny", "tiny-random")
"""Encoders whose weights, if any, come with patchbank."""
MOST_CLASSES = 60
"""Rows of the table of classes; `probe.json` has all."""
ONE_LICENCE = 30
"""Characters that the name of a licence has at most; more is a sentence about it."""


def model_card(
    artefact: ProbeArtefact, *, name: str, results: Mapping[str, Any], licence: str = ""
) -> str:
    """Markdown with a YAML header; `results` is what results.json holds, `licence` of the encoder's
    weights. No name or value in it becomes markup."""
    licence = one_line(licence)
    scores = [row for row in results["scores"] if row["probe"] == name]
    parts = [
        _header(scores, licence),
        _summary(artefact, name, licence),
        _scores(scores, str(artefact.training.get("fold", "split"))),
        _decisions(artefact),
        _use(artefact),
        _training(artefact),
        _limits(artefact, results),
    ]
    return "\n\n".join(parts) + "\n"


def _header(scores: Sequence[Mapping[str, Any]], licence: str) -> str:
    metrics = dict.fromkeys(row["metric"] for row in scores)
    lines = ["---", "library_name: patchbank", "pipeline_tag: audio-classification", "tags:"]
    lines += [f"- {tag}" for tag in ("audio-classification", "patchbank", "probe")]
    if licence and len(licence) <= ONE_LICENCE:
        lines.append(f"license: {_yaml(licence.lower().replace(' ', '-'))}")
    elif licence:
        lines += ["license: other", f"license_name: {_yaml(licence)}"]
    lines += ["metrics:", *(f"- {_yaml(metric)}" for metric in metrics)]
    return "\n".join([*lines, "---"])


def _summary(artefact: ProbeArtefact, name: str, licence: str) -> str:
    kind = "any number of" if artefact.multi_label else "one of"
    layers = "+".join(map(str, artefact.layers))
    window_s = artefact.window.get("window_s")
    rows = {
        "probe": f"{code(artefact.probe)} {code(json.dumps(artefact.options))}",
        "encoder": f"{code(_encoder_name(artefact))}, layer {layers}",
        "encoder id": code(artefact.encoder_id),
        "licence of the encoder's weights": escaped(licence) or "not stated",
        "bank": code(str(artefact.training.get("bank", "unknown"))),
        "recipe id": code(str(artefact.training.get("recipe_id", "unknown"))),
        "window": "unknown" if window_s is None else f"{window_s:g} s",
        "classes": str(len(artefact.classes)),
    }
    return "\n".join(
        [
            f"# {escaped(name)}",
            "",
            f"A probe that gives a window of audio {kind} {len(artefact.classes)} classes, from "
            "the tokens of a frozen encoder. The encoder is not in this folder.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in rows.items()),
        ]
    )


def _scores(scores: Sequence[Mapping[str, Any]], fold: str) -> str:
    saved = "" if fold == "split" else f" and, among the folds, {code(fold)}"
    lines = [
        "## Scores",
        "",
        "Means over all seeds of the run, of probabilities as they were before calibration. The "
        f"weights in this folder are of the seed{saved} that validation clips prefer.",
        "",
        "| split | metric | mean | std | 95 % interval | clips | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for split in ("test", "valid"):
        for row in scores:
            if row["split"] == split:
                low, high = row["ci95"]
                lines.append(
                    f"| {split} | {row['metric']} | {_number(row['mean'])} | "
                    f"{_number(row['std'])} | {_number(low)} - {_number(high)} | "
                    f"{row['n_clips']} | {row['n_seeds']} |"
                )
    return "\n".join(lines)


def _decisions(artefact: ProbeArtefact) -> str:
    facts = artefact.validation
    lines = [
        "## Probabilities and decisions",
        "",
        f"Logits are divided by the temperature T = {artefact.temperature:.4g}, which makes the "
        f"labels of the {facts['n_clips']} validation clips likeliest: their mean negative "
        f"log-likelihood is {facts['nll_before']:.4f} at T = 1 and {facts['nll_after']:.4f} at "
        "this T. It changes no ranking.",
    ]
    if artefact.temperature in (LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE):
        lines += [
            "",
            "This T is a bound of the search, so no temperature fits: the validation clips are "
            "told apart without a mistake, or hardly at all.",
        ]
    if not artefact.multi_label:
        return "\n".join([*lines, "", "The decision is the likeliest class."])
    lines += [
        "",
        "A class is there where its probability reaches its threshold, the one with the best F1 on "
        "the validation clips that chose it; on new audio F1 is lower.",
        "",
        "| class | threshold | F1 |",
        "|---|---|---|",
    ]
    found = zip(artefact.classes, artefact.thresholds, facts["f1"], strict=True)
    for name, threshold, f1 in list(found)[:MOST_CLASSES]:
        reached = "not chosen: no validation clip has it" if f1 is None else f"{f1:.3f}"
        lines.append(f"| {escaped(name)} | {threshold:.4f} | {reached} |")
    if len(artefact.classes) > MOST_CLASSES:
        n_more = len(artefact.classes) - MOST_CLASSES
        lines += ["", f"{n_more} more classes are in `probe.json`."]
    if artefact.default_thresholds:
        n_default = len(artefact.default_thresholds)
        lines += ["", f"{n_default} classes have the default threshold {DEFAULT_THRESHOLD}."]
    return "\n".join(lines)


def _use(artefact: ProbeArtefact) -> str:
    files = {
        "weights": "FILE" if _weights_of(artefact) else "",
        "plugin": "FILE.py" if artefact.plugin_sha256 else "",
    }
    typed = "".join(f" --{name} {file}" for name, file in files.items() if file)
    passed = "".join(f', {name}="{file}"' for name, file in files.items() if file)
    lines = [
        "## Use",
        "",
        "From the folder that holds this file:",
        "",
        "```python",
        "from patchbank.cli.predictor import Predictor",
        "",
        f'predictor = Predictor("."{passed})',
        'rows = list(predictor.audio("recordings/"))',
        "```",
        "",
        "```bash",
        f"patchbank predict . recordings/ --format audacity --out labels/{typed}",
        "```",
    ]
    encoder = code(_encoder_name(artefact))
    if _weights_of(artefact):
        digest = code(_weights_of(artefact))
        lines += ["", f"FILE is the checkpoint of {encoder}; its sha256 is {digest}."]
    if _encoder_name(artefact) not in NEEDS_NO_FILE:
        lines += [
            "",
            f"If a file of your own builds {encoder}: `--encoder FILE.py` as well.",
        ]
    if artefact.plugin_sha256:
        lines += ["", f"FILE.py builds the probe; its sha256 is {code(artefact.plugin_sha256)}."]
    return "\n".join(lines)


def _training(artefact: ProbeArtefact) -> str:
    training = dict(artefact.training)
    command = training.pop("command", [])
    typed = code_block("bash", shlex.join(command)) if command else "Trained from Python."
    facts = {key: value for key, value in training.items() if key not in ("bank", "recipe_id")}
    return "\n\n".join(["## Training", typed, code_block("json", json.dumps(facts, indent=2))])


def _limits(artefact: ProbeArtefact, results: Mapping[str, Any]) -> str:
    return "\n".join(["## Limits", "", *(f"- {one}" for one in _found_limits(artefact, results))])


def _found_limits(artefact: ProbeArtefact, results: Mapping[str, Any]) -> Iterator[str]:
    encoder = code(_encoder_name(artefact))
    yield f"Tokens of another encoder than {encoder} with these weights are refused."
    yield "Nothing but its classes can be found, and other recordings may be other than these."
    loss = artefact.training.get("settings", {}).get("loss")
    if artefact.multi_label and loss in ("auto", "asymmetric"):
        yield (
            "The asymmetric loss trained it, which pulls probabilities off the frequencies; one "
            "temperature cannot undo that. Use the thresholds, not one half."
        )
    unjudged = dict.fromkeys(
        name for row in results["left_out"] if row["split"] == "test" for name in row["classes"]
    )
    if unjudged:
        yield (
            f"{len(unjudged)} classes could not be judged on the test clips of a fold: "
            + ", ".join(map(escaped, list(unjudged)[:MOST_CLASSES]))
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _encoder_name(artefact: ProbeArtefact) -> str:
    return str(artefact.encoder.get("name", "unknown"))


def _weights_of(artefact: ProbeArtefact) -> str:
    """The digest of the file that the encoder needs, "" where it needs none."""
    own = _encoder_name(artefact) in NEEDS_NO_FILE
    return "" if own else str(artefact.encoder.get("weights_sha256", ""))


def _yaml(text: str) -> str:
    """A JSON string, which is a YAML string, whatever is in it."""
    return json.dumps(one_line(text), ensure_ascii=False)
