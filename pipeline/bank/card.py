"""The attributes of a bank's root group: who wrote it, and the shapes that follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patchbank.pipeline.bank.dtypes import STORED_TYPES
from patchbank.pipeline.bank.schema import FORMAT_VERSION, BankSchema
from patchbank.pipeline.bank.seal_record import NO_JSON
from patchbank.pipeline.errors import BankCorrupt, BankError, BankNotFound
from patchbank.pipeline.specs import Grid, Json, LayerSpec, digest

RECIPE_FIELDS = (
    "encoder",
    "window",
    "stored_dtype",
    "compute_dtype",
    "mask_padding",
    "quantisation",
)
"""The recipe's fields in a card; the list of layers is the seventh."""


def schema_of_card(card: Json) -> BankSchema:
    """The shapes that a card states.

    Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for a card that states none.
    """
    layers, grids = [], {}
    for key, layer in sorted(card["layers"].items(), key=lambda item: int(item[0])):
        number = _count(int(key), "layer")
        if key != str(number):
            raise ValueError(f"layer {key!r}")
        n_prefix = _count(layer["n_prefix"], "n_prefix", least=0)
        layers.append(LayerSpec(number, layer["meaning"], _count(layer["dim"], "dim"), n_prefix))
        grid = Grid(**layer["grid"])
        grids[number] = Grid(_count(grid.time, "grid.time"), _count(grid.freq, "grid.freq"))
    if not layers or card["stored_dtype"] not in STORED_TYPES:
        raise ValueError(f"{len(layers)} layers of {card['stored_dtype']!r}")
    generations = [_count(n_clips, "generations") for n_clips in card["generations"]]
    if not generations:
        raise ValueError("no generations")
    return BankSchema(
        generations=tuple(generations),
        rows_per_shard=_count(card["rows_per_shard"], "rows_per_shard"),
        layers=tuple(layers),
        grids=grids,
        stored_dtype=card["stored_dtype"],
    )


def _count(value: Any, name: str, *, least: int = 1) -> int:
    """`value` as a number of things; what a bank holds can be counted in 48 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**48:
        raise ValueError(f"{name} is {str(value)[:40]}, expected a whole number from {least}")
    return value


def layers_of_schema(schema: BankSchema) -> Json:
    """The card's `layers`: what each stored layer is, and its grid."""
    return {
        str(spec.layer): {
            "meaning": spec.meaning,
            "dim": spec.dim,
            "n_prefix": spec.n_prefix,
            "grid": asdict(schema.grids[spec.layer]),
        }
        for spec in schema.layers
    }


def recipe_of_card(card: Json) -> Json:
    """The recipe's identity as a bank's card tells it."""
    layers = sorted(int(layer) for layer in card["layers"])
    return {field: card[field] for field in RECIPE_FIELDS} | {"layers": layers}


def attributes_of_card(card: Json) -> Json:
    """The attributes of a bank's root group: format, identities and card."""
    return {
        "patchbank_format": FORMAT_VERSION,
        "encoder_id": digest(card["encoder"]),
        "recipe_id": digest(recipe_of_card(card)),
        "card": card,
    }


def read_attributes(path: Path) -> Json:
    """The bank attributes of a folder, sealed or not.

    Raises `BankNotFound` where it is no bank, `BankError` for a newer format, `BankCorrupt`.
    """
    try:
        document = json.loads((path / "zarr.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise BankNotFound(f"no bank at {path}: there is no zarr.json") from None
    except NO_JSON as error:
        raise BankCorrupt(f"{path / 'zarr.json'} is no JSON: {str(error)[:200]}") from error
    attributes = document.get("attributes", {}) if isinstance(document, Mapping) else {}
    if not isinstance(attributes, Mapping) or "patchbank_format" not in attributes:
        raise BankNotFound(f"{path} is a Zarr group but no bank: it has no patchbank_format")
    version = attributes["patchbank_format"]
    if version != FORMAT_VERSION:
        raise BankError(
            f"{path} has bank format {str(version)[:40]}; this patchbank reads format "
            f"{FORMAT_VERSION}: pip install --upgrade patchbank"
        )
    if not isinstance(attributes.get("card"), Mapping):
        raise BankCorrupt(f"{path / 'zarr.json'} has no card; pull the bank again")
    return dict(attributes)
