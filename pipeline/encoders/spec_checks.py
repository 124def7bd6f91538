"""The checks of the encoder contract that need no audio: what an encoder says of itself."""

from __future__ import annotations

import json
import re

from patchbank.pipeline.encoders.base import RESAMPLER
from patchbank.pipeline.encoders.bench import Bench, Broken, Doubtful
from patchbank.pipeline.encoders.catalogue import NOT_STATED, shipped
from patchbank.pipeline.encoders.discovery import is_file
from patchbank.pipeline.specs import EncoderSpec, LayerSpec, canonical_json, differing_fields


def check_spec(bench: Bench) -> str:
    """Whether the spec can become a card, and whether its name leads back to the encoder."""
    spec = bench.encoder.spec
    if not isinstance(spec, EncoderSpec):
        raise Broken(type(spec).__name__, expected="an EncoderSpec")
    problems = [*_problems_of_name(spec.name, bench.reference), *_problems_of_fields(spec)]
    if problems:
        raise Broken("; ".join(problems), expected="a spec that a bank's card can hold")
    return f"{spec.name}, encoder_id {spec.encoder_id[:12]}"


def _problems_of_name(name: object, reference: str) -> list[str]:
    if not isinstance(name, str) or not name.strip():
        return [f"name is {name!r}, not a text"]
    entry = shipped(name)
    if is_file(reference) and entry is not None:
        return [f"name is {name!r}, which is a shipped encoder; choose another"]
    # A file of fine-tuned weights adds a + to the name that it is asked for by.
    names = (name,) if entry is None else entry.names
    if reference and not is_file(reference) and reference not in names:
        return [f"name is {name!r}, which predict would not find; it is loaded as {reference!r}"]
    return []


def _problems_of_fields(spec: EncoderSpec) -> list[str]:
    problems = []
    if not _is_count(spec.sample_rate_hz):
        problems.append(f"sample_rate_hz is {spec.sample_rate_hz!r}, not a whole number from 1")
    if not re.fullmatch(r"([0-9a-f]{64})?", str(spec.weights_sha256)):
        problems.append("weights_sha256 is neither empty nor 64 hexadecimal digits")
    if spec.resampler != RESAMPLER:
        problems.append("resampler is not RESAMPLER, the one that audio comes through")
    numbers = [layer.layer for layer in spec.layers]
    if not numbers or len(set(numbers)) < len(numbers) or not all(map(_is_count, numbers)):
        problems.append(f"layers are numbered {numbers}, not by different numbers from 1")
    problems += [problem for layer in spec.layers for problem in _problems_of_layer(layer)]
    identity = spec.identity()
    try:
        # What changes on its way through JSON would never equal the card that it is written to.
        if differing := differing_fields(json.loads(canonical_json(identity)), identity):
            problems.append(f"{', '.join(differing)} become another value in JSON (a tuple?)")
    except (TypeError, ValueError) as error:
        problems.append(f"config or frontend is no JSON: {error}")
    return problems


def _problems_of_layer(layer: LayerSpec) -> list[str]:
    problems = []
    if not _is_count(layer.dim) or not _is_count(layer.n_prefix, least=0):
        problems.append(f"layer {layer.layer} has dim {layer.dim!r}, n_prefix {layer.n_prefix!r}")
    if not isinstance(layer.meaning, str) or not layer.meaning.strip():
        problems.append(f"layer {layer.layer} does not say what it means")
    return problems


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_licence(bench: Bench) -> str:
    """Whether a licence is stated; a warning where it is not."""
    spec = bench.encoder.spec
    if spec.licence.strip() in ("", NOT_STATED):
        raise Doubtful(
            "no licence, or none that the publisher states",
            expected="the licence of the weights, which lands in every bank's card",
            hint='EncoderSpec(..., licence="CC BY-NC 4.0", source="where they are from")',
        )
    return spec.licence
