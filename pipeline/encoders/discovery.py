"""Where an encoder's `load` is found: among the shipped ones, as an entry point, or in a file.

Only the one that is asked for is imported, so that a broken plugin breaks nothing else.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from patchbank.pipeline.encoders.catalogue import ENCODERS, shipped
from patchbank.pipeline.errors import EncoderError, PatchbankError, told

if TYPE_CHECKING:
    from patchbank.pipeline.encoders.base import Encoder

GROUP = "patchbank.encoders"
MEMBERS = ("spec", "frontend", "encode", "grids", "to")
"""What every encoder has."""
Load = Callable[..., "Encoder"]


@dataclass(frozen=True)
class InstalledEncoder:
    """A name that an installed package offers, known without importing it."""

    name: str
    value: str
    """The module that has `load`, or `module:function`."""
    distribution: str
    """Name and version of the package that offers it."""


def installed_encoders() -> list[InstalledEncoder]:
    """The entry points of the group `patchbank.encoders`, ordered by name; imports none of them."""
    installed = []
    for point in entry_points(group=GROUP):
        who = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"
        installed.append(InstalledEncoder(point.name, point.value, who))
    return sorted(installed, key=lambda one: (one.name, one.distribution))


def is_known(name: str) -> bool:
    """Whether an encoder of that name is shipped or installed."""
    return shipped(name) is not None or any(one.name == name for one in installed_encoders())


def is_file(reference: str) -> bool:
    """Whether an encoder is named by a file of Python rather than by a name."""
    return reference.endswith(".py")


def absolute_reference(reference: str) -> str:
    """`reference` as it means the same in any folder: a file by its absolute path."""
    return str(Path(reference).expanduser().absolute()) if is_file(reference) else reference


def find_load(reference: str) -> Load:
    """The `load` of a shipped or installed encoder, or of a file that ends in `.py`.

    Raises `EncoderError` where there is none, where the module cannot be imported, and for a name
    that two packages offer. What a plugin's `load` raises becomes an `EncoderError` with its line.
    """
    if is_file(reference):
        return _guarded(_load_of(_run_file(reference), reference), reference)
    offers = [one for one in installed_encoders() if one.name == reference]
    entry = shipped(reference)
    if entry is not None:
        offers.insert(0, InstalledEncoder(reference, entry.module, "patchbank"))
    if len(offers) > 1:
        who = " and ".join(one.distribution for one in offers)
        raise EncoderError(
            f"encoder {reference!r} is offered by {who}, expected by one; rename the entry point "
            "or uninstall the package that you do not mean"
        )
    if not offers:
        raise EncoderError(_unknown(reference))
    if entry is not None:
        load: Load = import_module(entry.module).load
        return load
    return _guarded(_load_of(_import(offers[0]), reference), reference)


def _unknown(reference: str) -> str:
    ours = [name for entry in ENCODERS.values() for name in entry.names]
    names = sorted({*ours, *(one.name for one in installed_encoders())})
    near = difflib.get_close_matches(reference, names, n=1)
    if Path(f"{reference}.py").is_file():
        near = [f"{reference}.py"]
    hint = f" (did you mean {near[0]}?)" if near else ""
    return (
        f"unknown encoder {reference!r}{hint}; there are: {', '.join(names)}; one of your own is "
        "named by its file, such as my_encoder.py"
    )


def _import(offer: InstalledEncoder) -> object:
    point = EntryPoint(offer.name, offer.value, GROUP)
    try:
        return point.load()
    except Exception as error:
        raise EncoderError(
            f"encoder {offer.name!r} of {offer.distribution} cannot be imported from "
            f"{offer.value}: {told(error, None)}; repair or uninstall that package"
        ) from error


def _run_file(reference: str) -> ModuleType:
    path = Path(absolute_reference(reference))
    if not path.is_file():
        raise EncoderError(f"no encoder file at {path}; give the path of the .py file")
    # Named by its place, so that equal names in two folders do not meet.
    name = f"patchbank_encoder_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Last, so that what lies beside the file can be imported but hides nothing.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    # Dataclasses look their module up while the file runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise EncoderError(f"cannot import {reference}: {told(error, str(path))}") from error
    return module


def _load_of(found: object, reference: str) -> Load:
    """The function that an entry point names, or a module's `load`."""
    load = found.__dict__.get("load") if isinstance(found, ModuleType) else found
    if not callable(load):
        raise EncoderError(
            f"{reference} has no load(weights, device); an encoder is a module with that function "
            "(docs/encoders.md)"
        )
    found_load: Load = load
    return found_load


def _guarded(load: Load, reference: str) -> Load:
    """`load`, whose mistakes are told with the line where they happen."""
    file = load.__code__.co_filename if isinstance(load, FunctionType) else None

    @wraps(load)
    def guarded(*arguments: Any, **options: Any) -> Encoder:
        try:
            encoder = load(*arguments, **options)
        except PatchbankError:
            raise
        except Exception as error:
            raise EncoderError(f"load() of {reference} failed: {told(error, file)}") from error
        missing = [name for name in MEMBERS if not hasattr(encoder, name)]
        if missing:
            raise EncoderError(
                f"load() of {reference} returned {type(encoder).__name__} without "
                f"{', '.join(missing)}; an encoder has {', '.join(MEMBERS)}"
            )
        return encoder

    return guarded
