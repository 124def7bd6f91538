"""The encoders that patchbank knows by name or finds in a file, and how one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbank.pipeline.encoders.discovery import find_load
from patchbank.pipeline.encoders.hub import is_remote, locate_weights
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import Json

if TYPE_CHECKING:
    import torch

    from patchbank.pipeline.encoders.base import Encoder


def load_encoder(
    name: str,
    *,
    weights: Path | str | None = None,
    device: torch.device | str = "cpu",
    preset: str | None = None,
    frontend: Mapping[str, Any] | None = None,
) -> Encoder:
    """The encoder `name` with its weights, in evaluation mode on `device`.

    `name` is one that is shipped, an entry point of the group `patchbank.encoders`, or the path of
    a file that ends in `.py`. `weights` is the publisher's own file or folder, or
    `hf:org/repo[@revision][:file]`; encoders with bundled weights or none take None. A fine-tuned
    file gives an encoder whose name ends in +; a name with + takes no other. `preset` names a
    convention for the front end ("published" where it is None) and `frontend` changes single
    constants of it; both end in `spec.frontend`. Raises `EncoderError` for an unknown name, a
    missing file, a plugin that fails, weights that do not fit, or constants that do not exist.
    """
    load = find_load(name)
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
    description: Json,
    *,
    weights: Path | str | None,
    device: torch.device | str,
    encoder: str | None = None,
) -> Encoder:
    """The encoder that `EncoderSpec.identity()` describes, as far as `weights` are the same.

    `encoder` is what `load_encoder` takes as its name; needed for an encoder in a file, whose place
    no description tells. The caller compares identities. Raises what `load_encoder` does.
    """
    load = find_load(str(description["name"]) if encoder is None else encoder)
    options = {"frontend": description["frontend"]} if _takes_frontend(load) else {}
    return _load(load, weights, device, options)


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
    if is_remote(weights):
        encoder.spec = replace(encoder.spec, source=located.reference)
    return encoder
