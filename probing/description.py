"""`probe.json`: what it holds as JSON, and what a file must hold to be taken for one.

A folder of results may come from anybody, so every field is checked before a probe is built.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from patchbank.pipeline.errors import PatchbankError, TrialError
from patchbank.pipeline.specs import PadRule, StoredDType, WindowSpec
from patchbank.probing.probes.base import ProbeShape

FORMAT = 3
KINDS = {
    "probe": str,
    "options": dict,
    "multi_label": bool,
    "shape": dict,
    "layers": list,
    "encoder_id": str,
    "encoder": dict,
    "window": dict,
    "tokens": dict,
    "plugin_sha256": str,
    "validation": dict,
    "training": dict,
}
"""Of the fields that nothing below looks at more closely first."""
WORDS = {str: "text", dict: "object", bool: "true or false", list: "list"}


def read_description(folder: Path) -> dict[str, Any]:
    """The fields of a `ProbeArtefact` but its weights; raises `TrialError` for any other file."""
    path = folder / "probe.json"
    if not path.is_file():
        nested = sorted(found.parent.name for found in folder.glob("*/probe.json"))
        hint = f"; it has probes {', '.join(nested)}: name one of these folders" if nested else ""
        raise TrialError(f"found no probe.json in {folder}, expected a probe's folder{hint}")
    try:
        fields = dict(json.loads(path.read_text("utf-8"), object_pairs_hook=_without_doubles))
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(folder, error) from error
    found = fields.pop("format", None)
    if found != FORMAT:
        raise TrialError(
            f"found format {found!r} in {path}, expected {FORMAT}; update patchbank or train again"
        )
    try:
        return _parsed(fields)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged(folder, error) from error


def damaged(folder: Path, error: Exception) -> TrialError:
    """What to raise for a probe.json that states something impossible."""
    return TrialError(
        f"{folder / 'probe.json'} is damaged ({error!r}); train again: patchbank train-probe"
    )


def label_map(classes: Sequence[str]) -> dict[str, int]:
    """Each class's index, in their order."""
    return {name: index for index, name in enumerate(classes)}


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON has no rule for a name that comes twice, and Python takes the last: a class is lost.
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands twice in one object")
        found[name] = value
    return found


def _parsed(fields: dict[str, Any]) -> dict[str, Any]:
    for name, kind in KINDS.items():
        if not isinstance(fields[name], kind):
            raise ValueError(f"{name} is {fields[name]!r}, no {WORDS[kind]}")
    _check_encoder(fields["encoder"])
    _check_window(fields["window"])
    _check_tokens(fields["tokens"])
    classes = _classes(fields["classes"])
    return fields | {
        "classes": classes,
        "layers": _layers(fields["layers"]),
        "shape": _shape(fields["shape"]),
        "temperature": _temperature(fields["temperature"]),
        "thresholds": _thresholds(fields["thresholds"], len(classes)),
        "default_thresholds": _some_of(fields["default_thresholds"], classes),
    }


def _check_encoder(encoder: dict[str, Any]) -> None:
    """What is there is of its kind; `ProbeArtefact.check_origin` asks for what audio needs."""
    for name, kind in (("name", str), ("frontend", dict)):
        if not isinstance(encoder.get(name, kind()), kind):
            raise ValueError(f"encoder.{name} is {encoder[name]!r}, no {WORDS[kind]}")


def _check_window(window: dict[str, Any]) -> None:
    for name, value in window.items():
        if name == "pad":
            if value not in get_args(PadRule):
                raise ValueError(f"window.pad is {value!r}, none of {get_args(PadRule)}")
        elif not _is_number(value):
            raise ValueError(f"window.{name} is {value!r}, no number")
    try:
        WindowSpec(**window)
    except PatchbankError as error:
        raise ValueError(f"window: {error}") from error


def _check_tokens(tokens: dict[str, Any]) -> None:
    stored = tokens.get("stored_dtype", "float16")
    if stored not in get_args(StoredDType):
        raise ValueError(f"tokens.stored_dtype is {stored!r}, none of {get_args(StoredDType)}")
    if not isinstance(tokens.get("mask_padding", False), bool):
        raise ValueError(f"tokens.mask_padding is {tokens['mask_padding']!r}, no true or false")


def _layers(layers: list[Any]) -> tuple[int, ...]:
    if any(type(one) is not int or one < 1 for one in layers) or len(set(layers)) < len(layers):
        raise ValueError(f"layers is {layers!r}, no different numbers from 1 on")
    return tuple(layers)


def _classes(indices: Any) -> tuple[str, ...]:
    if not isinstance(indices, dict) or not indices:
        raise ValueError(f"classes is {indices!r}, no object of names and indices")
    if list(indices.values()) != list(range(len(indices))) or any(
        type(index) is not int for index in indices.values()
    ):
        raise ValueError("classes has indices other than 0, 1, 2 ... in order")
    return tuple(indices)


def _temperature(value: Any) -> float:
    if not _is_number(value) or value <= 0:
        raise ValueError(f"temperature is {value!r}, no number above 0")
    return float(value)


def _thresholds(values: Any, n_classes: int) -> tuple[float, ...]:
    """None at all, or one a class."""
    if not isinstance(values, list) or len(values) not in (0, n_classes):
        n_found = len(values) if isinstance(values, list) else repr(values)
        raise ValueError(f"found {n_found} thresholds for {n_classes} classes")
    for value in values:
        if not _is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"a threshold is {value!r}, no number from 0 to 1")
    return tuple(map(float, values))


def _some_of(names: Any, classes: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(name in classes for name in names):
        raise ValueError(f"default_thresholds is {names!r}, no list of classes")
    return tuple(names)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _shape(fields: Mapping[str, Any]) -> ProbeShape:
    grid = None if fields.get("grid") is None else tuple(fields["grid"])
    if grid is not None and len(grid) != 2:
        raise ValueError(f"grid is {list(grid)}, no (time, freq)")
    least = {"dim": 1, "n_classes": 1, "n_layers": 1, "n_prefix": 0}
    sizes = [(fields[name], least[name]) for name in least if name in fields]
    for value, lowest in (*sizes, *((one, 1) for one in grid or ())):
        if type(value) is not int or value < lowest:
            raise ValueError(f"shape is {dict(fields)}, no sizes of tokens")
    return ProbeShape(**{**fields, "grid": grid})
