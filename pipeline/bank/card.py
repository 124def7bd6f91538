"""The attributes of a bank's root group: who wrote it, and the shapes that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from patchbank.pipeline.bank.dtypes import STORED_TYPES
from patchbank.pipeline.bank.schema import FORMAT_VERSION, BankSchema, Storage
from patchbank.pipeline.bank.seal_record import as_digest, brief, parse_json
from patchbank.pipeline.errors import BankCorrupt, BankError, BankNotFound, PatchbankError
from patchbank.pipeline.specs import (
    LONGEST_WINDOW_S,
    AugmentSpec,
    GainSpec,
    Grid,
    Json,
    LayerSpec,
    MixupSpec,
    ShiftSpec,
    canonical_json,
    differing_fields,
    digest,
)

RECIPE_FIELDS = (
    "encoder",
    "window",
    "stored_dtype",
    "compute_dtype",
    "mask_padding",
    "quantisation",
)
"""The recipe's fields in a card; the list of layers is the seventh, and `augment` the eighth of a
bank that makes views."""
LONGEST_TEXT = 65_536
MOST_LAYERS = 1_000
LARGEST_CARD_BYTES = 16 * 2**20


def checked_schema(attributes: Json) -> BankSchema:
    """The shapes that a bank's attributes state, once all that its readers use is what it should
    be; raises what `schema_of_card` does."""
    as_digest(attributes["encoder_id"])
    as_digest(attributes["recipe_id"])
    card = attributes["card"]
    encoder, window = card["encoder"], card["window"]
    _text(encoder["name"], "encoder.name")
    _text(encoder["weights_sha256"], "encoder.weights_sha256")
    _count(encoder["sample_rate_hz"], "encoder.sample_rate_hz")
    for name in ("window_s", "hop_s"):
        _seconds(window[name], f"window.{name}")
    for name in ("licence", "source", "compute_dtype"):
        _text(card[name], name)
    if not isinstance(card["quantisation"], Mapping) or not isinstance(card["mask_padding"], bool):
        raise ValueError("quantisation is no object, or mask_padding neither true nor false")
    if window["pad"] not in ("zero", "repeat"):
        raise ValueError(f"window.pad is {brief(window['pad'])}")
    _check_origin(card)
    augment_of_card(card)
    schema = schema_of_card(card)
    for spec in schema.layers:
        of_encoder = encoder["layers"][str(spec.layer)]
        if (of_encoder["dim"], of_encoder["n_prefix"]) != (spec.dim, spec.n_prefix):
            raise ValueError(f"layer {spec.layer} is another one in encoder.layers")
    return schema


def _check_origin(card: Json) -> None:
    """What a card says of the machine that computed the tokens, and of the banks they are from."""
    ran = card["extraction"]
    _text(ran["device"], "extraction.device")
    _count(ran["batch_size"], "extraction.batch_size")
    for name, version in ran["versions"].items():
        _text(version, f"extraction.versions.{name[:40]}")
    for parent in card.get("derived_from", []):
        as_digest(parent["fingerprint"])
        _text(parent["stored_dtype"], "derived_from.stored_dtype")
        _count(parent.get("n_clips", 1), "derived_from.n_clips")
        for layer in _listed(parent, "layers"):
            _count(layer, "derived_from.layers")
        for split in _listed(parent, "splits"):
            _text(split, "derived_from.splits")


def _listed(parent: Json, name: str) -> list[Any]:
    found = parent.get(name, [])
    if not isinstance(found, list) or len(found) > MOST_LAYERS:
        raise ValueError(f"derived_from.{name} is {brief(found)}, expected a list")
    return found


def schema_of_card(card: Json) -> BankSchema:
    """The shapes that a card states.

    Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for a card that states none.
    """
    if len(card["layers"]) > MOST_LAYERS:
        raise ValueError(f"{len(card['layers'])} layers, expected at most {MOST_LAYERS}")
    layers, grids = [], {}
    for key, layer in sorted(card["layers"].items(), key=lambda item: int(item[0])):
        number = _count(int(key), "layer")
        if key != str(number):
            raise ValueError(f"layer {key!r}")
        n_prefix = _count(layer["n_prefix"], "n_prefix", least=0)
        meaning, dim = _text(layer["meaning"], "meaning"), _count(layer["dim"], "dim")
        layers.append(LayerSpec(number, meaning, dim, n_prefix))
        grid = layer["grid"]
        if set(grid) != {"time", "freq"}:
            raise ValueError(f"grid is {brief(grid)}")
        grids[number] = Grid(*(_count(grid[axis], f"grid.{axis}") for axis in ("time", "freq")))
    if not layers or card["stored_dtype"] not in STORED_TYPES:
        raise ValueError(f"{len(layers)} layers of {card['stored_dtype']!r}")
    n_packed = STORED_TYPES[card["stored_dtype"]].n_packed
    if any(spec.dim % n_packed for spec in layers):
        raise ValueError(f"{card['stored_dtype']} of an odd number of channels")
    generations = [_count(n_clips, "generations") for n_clips in card["generations"]]
    if not generations:
        raise ValueError("no generations")
    return BankSchema(
        generations=tuple(generations),
        rows_per_shard=_count(card["rows_per_shard"], "rows_per_shard"),
        layers=tuple(layers),
        grids=grids,
        stored_dtype=card["stored_dtype"],
        storage=_storage(card.get("storage", "aligned")),
    )


def _storage(value: Any) -> Storage:
    if value not in get_args(Storage):
        raise ValueError(f"storage is {brief(value)}")
    found: Storage = value
    return found


def _count(value: Any, name: str, *, least: int = 1) -> int:
    """`value` as a number of things; what a bank holds can be counted in 48 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**48:
        raise ValueError(f"{name} is {brief(value)}, expected a whole number from {least}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise ValueError(f"{name} is {brief(value)}, expected a text")
    return value


def _seconds(value: Any, name: str) -> None:
    if type(value) not in (int, float) or not 0 < value <= LONGEST_WINDOW_S:
        raise ValueError(f"{name} is {brief(value)}, expected seconds")


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
    augment = {"augment": card["augment"]} if "augment" in card else {}
    return {field: card[field] for field in RECIPE_FIELDS} | {"layers": layers} | augment


def augment_of_card(card: Json) -> AugmentSpec | None:
    """How a bank makes views; None where it makes none. Raises what `schema_of_card` does."""
    if "augment" not in card:
        return None
    parts = dict(card["augment"])
    try:
        specs: dict[str, Any] = {
            name: kind(**parts.pop(name))
            for name, kind in (("mixup", MixupSpec), ("shift", ShiftSpec), ("gain", GainSpec))
            if name in parts
        }
        augment = AugmentSpec(**specs, **parts)
    except PatchbankError as error:
        raise ValueError(f"augment: {error}") from error
    # A default that is not spelt out, or 1 for 1.0, would be the same views under another identity.
    if canonical_json(augment.identity()) != canonical_json(card["augment"]):
        raise ValueError(f"augment is {brief(card['augment'])}, which nothing here writes")
    return augment


def recipe_differences(
    found: Mapping[str, Any], expected: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """The fields in which two recipes differ; what follows from another stored type is left out."""
    differences = differing_fields(found, expected)
    kinds = [set(recipe.get("augment", ())) for recipe in (found, expected)]
    if kinds[0] != kinds[1]:
        differences = {k: v for k, v in differences.items() if k.split(".")[0] != "augment"}
        differences["augment"] = (_augment_options(found), _augment_options(expected))
    if "stored_dtype" in differences:
        return {k: v for k, v in differences.items() if not k.startswith("quantisation.")}
    return differences


def _augment_options(recipe: Mapping[str, Any]) -> str | None:
    augment = augment_of_card(dict(recipe))
    return None if augment is None else augment.options


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
    file = path / "zarr.json"
    if not file.is_file():
        raise BankNotFound(f"no bank at {path}: there is no zarr.json")
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST_CARD_BYTES + 1)
    except OSError as error:
        raise BankCorrupt(
            f"{file} cannot be read: {error.strerror}; pull the bank again"
        ) from error
    return parse_attributes(content, where=str(path))


def parse_attributes(content: bytes, *, where: str) -> Json:
    """The bank attributes that the bytes of a zarr.json hold; raises what `read_attributes` does.

    `where` is the bank, for messages.
    """
    file = f"{where}/zarr.json"
    if len(content) > LARGEST_CARD_BYTES:
        raise BankCorrupt(f"{file} has more than {LARGEST_CARD_BYTES} bytes; pull the bank again")
    try:
        document = parse_json(content)
    except ValueError as error:
        raise BankCorrupt(f"{file} is no JSON: {str(error)[:200]}; pull the bank again") from error
    attributes = document.get("attributes", {}) if isinstance(document, Mapping) else {}
    if not isinstance(attributes, Mapping) or "patchbank_format" not in attributes:
        raise BankNotFound(f"{where} is a Zarr group but no bank: it has no patchbank_format")
    version = attributes["patchbank_format"]
    if type(version) is not int or version < FORMAT_VERSION:
        raise BankCorrupt(
            f"{file} has patchbank_format {brief(version)}, expected a whole number from "
            f"{FORMAT_VERSION}; pull the bank again"
        )
    if version != FORMAT_VERSION:
        raise BankError(
            f"{where} has bank format {version}; this patchbank reads format "
            f"{FORMAT_VERSION}: pip install --upgrade patchbank"
        )
    if not isinstance(attributes.get("card"), Mapping):
        raise BankCorrupt(f"{file} has no card; pull the bank again")
    return dict(attributes)
