"""The encoders that patchbank knows by name, and how one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbank.pipeline.encoders.catalogue import ENCODERS
from patchbank.pipeline.encoders.hub import locate_weights
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import Json

if TYPE_CHECKING:
    import torch

    from patchbank.pipeline.encoders.base import Encoder


def encoder_names() -> list[str]:
    """Names that `load_encoder` takes."""
    fine_tuned = [f"{name}+" for name, entry in ENCODERS.items() if entry.has_fine_tuned]
    return sorted([*ENCODERS, *fine_tuned])


def load_encoder(
    name: str,
    *,
    weights: Path | str | None = None,
    device: torch.device | str = "cpu",
    preset: str | None = None,
    frontend: Mapping[str, Any] | None = None,
) -> Encoder:
    """The encoder `name` with its weights, in evaluation mode on `device`.

    `weights` is the publisher's own file or folder, or `hf:org/repo[@revision][:file]`; encoders
    with bundled weights or none take None. A fine-tuned file gives an encoder whose name ends in
    +; a name with + takes no other.
    `preset` names a convention for the front end ("published" where it is None) and `frontend`
    changes single constants of it; both end in `spec.frontend`. Raises `EncoderError` for an
    unknown name, a missing file, weights that do not fit, or constants that do not exist.
    """
    load = _loader(name)
    options: dict[str, Any] = {}
    if preset is not None:
        options["preset"] = preset
    if frontend:
        options["frontend"] = frontend
    if options and not _takes_frontend(load):
        raise EncoderError(f"the front end of {name} has no presets or constants to choose")
    encoder = _load(load, weights, device, options)
    if name.endswith("+") and encoder.spec.name != name:
        raise EncoderError(
            f"{weights} holds pre-trained weights of {encoder.spec.name}, expected fine-tuned "
            f"ones; ask for {encoder.spec.name}, or give the fine-tuned file"
        )
    return encoder


def reload_encoder(
    description: Json, *, weights: Path | str | None, device: torch.device | str
) -> Encoder:
    """The encoder that `EncoderSpec.identity()` describes, as far as `weights` are the same.

    The caller compares identities. Raises what `load_encoder` does.
    """
    load = _loader(str(description["name"]))
    options = {"frontend": description["frontend"]} if _takes_frontend(load) else {}
    return _load(load, weights, device, options)


def _loader(name: str) -> Callable[..., Encoder]:
    if name not in encoder_names():
        raise EncoderError(f"unknown encoder {name!r}; there are: {', '.join(encoder_names())}")
    load: Callable[..., Encoder] = import_module(ENCODERS[name.removesuffix("+")].module).load
    return load


def _takes_frontend(load: Callable[..., Encoder]) -> bool:
    return "frontend" in signature(load).parameters


def _load(
    load: Callable[..., Encoder],
    weights: Path | str | None,
    device: torch.device | str,
    options: dict[str, Any],
) -> Encoder:
    if weights is None:
        return load(None, device, **options)
    located = locate_weights(weights)
    encoder = load(located.path, device, **options)
    if located.is_remote:
        encoder.spec = replace(encoder.spec, source=located.reference)
    return encoder
