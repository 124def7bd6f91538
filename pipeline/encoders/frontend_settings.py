"""Constants of a front end as the caller may choose them, and presets of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from patchbank.pipeline.errors import EncoderError

PUBLISHED = "published"
BAT = "bat"
"""The conventions of the code beside BAT (houtan-ghaffari/BAT_ICML2026): normalise, then pad with
zeros to whole patches; statistics of its own."""
Settings = TypeVar("Settings")


def choose_settings(
    encoder: str,
    presets: Mapping[str, Settings],
    preset: str | None,
    changes: Mapping[str, Any] | None,
) -> Settings:
    """The settings of a preset (published where None) with some constants changed.

    Raises `EncoderError` for a preset or a constant that does not exist, or a value of another
    kind than the constant's.
    """
    name = preset or PUBLISHED
    if name not in presets:
        raise EncoderError(
            f"{encoder} has no front-end preset {name!r}; there are: {', '.join(presets)}"
        )
    settings = presets[name]
    known = {field.name: getattr(settings, field.name) for field in fields(settings)}  # type: ignore[arg-type]
    values = {}
    for key, value in (changes or {}).items():
        if key not in known:
            raise EncoderError(
                f"the front end of {encoder} has no constant {key!r}; there are: {', '.join(known)}"
            )
        values[key] = _as(value, known[key], f"{key} of {encoder}")
    return replace(settings, **values)  # type: ignore[type-var]


def _as(value: Any, like: Any, name: str) -> Any:
    """A value as the type of a default; JSON has lists for tuples, and whole numbers for floats."""
    if isinstance(like, bool) or isinstance(value, bool):
        is_right = isinstance(like, bool) and isinstance(value, bool)
    elif isinstance(like, float):
        is_right = isinstance(value, (int, float))
        value = float(value) if is_right else value
    elif isinstance(like, tuple):
        is_right = isinstance(value, (list, tuple)) and all(isinstance(x, int) for x in value)
        value = tuple(value) if is_right else value
    else:
        is_right = isinstance(value, type(like))
    if not is_right:
        raise EncoderError(f"{name} is {like!r} by default, found {value!r}; give the same kind")
    return value
