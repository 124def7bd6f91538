"""Opens a sealed bank: its card, its clips, and where each row's bytes lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from jaxtyping import Float, Int32, Int64

from patchbank.pipeline.bank.layout import parse_index
from patchbank.pipeline.bank.schema import DONE, FAILED, FORMAT_VERSION, BankSchema, TokenArray
from patchbank.pipeline.bank.seal import SEAL, root_hash
from patchbank.pipeline.bank.writer import hash_file
from patchbank.pipeline.errors import BankCorrupt, BankError, BankIncomplete, BankNotFound
from patchbank.pipeline.specs import Grid, Json, LayerSpec


@dataclass(frozen=True)
class RowPlaces:
    """Where the rows of one array lie: row i is `row_bytes` bytes at `offset[i]` of its file."""

    array: TokenArray
    files: tuple[Path, ...]
    rows_per_shard: int
    offset: Int64[np.ndarray, " clip"]

    def shard_of(self, row: int) -> int:
        return row // self.rows_per_shard


class Bank:
    """A sealed bank, read-only. Use `open_bank`."""

    def __init__(self, path: Path, attributes: Json, seal: Json) -> None:
        self.path = path
        self.card: Json = attributes["card"]
        self.encoder_id: str = attributes["encoder_id"]
        self.recipe_id: str = attributes["recipe_id"]
        self.fingerprint: str = seal["fingerprint"]
        self.root_sha256: str = seal["root_sha256"]
        self.schema = schema_of_card(self.card)
        self._sizes = {file["path"]: int(file["size"]) for file in seal["files"]}

    @property
    def n_rows(self) -> int:
        return self.schema.n_rows

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers in the bank, ascending."""
        return tuple(spec.layer for spec in self.schema.layers)

    @cached_property
    def clips(self) -> pa.Table:
        """clips.parquet, one row a bank row, in order."""
        return pq.read_table(self.path / "clips.parquet")

    @property
    def status(self) -> Int32[np.ndarray, " clip"]:
        """1 done, 2 failed, 3 hole."""
        return np.asarray(self.clips["status"]).astype(np.int32)

    def resolve_layer(self, layer: int | None) -> int:
        """`layer`, or the last one where None; `BankError` where the bank lacks it."""
        if layer is None:
            return self.layers[-1]
        if layer not in self.layers:
            raise BankError(f"{self.path} has no layer {layer}; it has {list(self.layers)}")
        return layer

    def array(self, layer: int, kind: str = "patches") -> TokenArray:
        """The sharded array of a layer; `BankError` where there is none of that kind."""
        for array in self.schema.arrays():
            if (array.layer, array.kind) == (self.resolve_layer(layer), kind):
                return array
        raise BankError(f"{self.path}: layer {layer} has no {kind} tokens")

    def n_patches(self, layer: int) -> Int32[np.ndarray, " clip"]:
        """Patches that count in each row."""
        return np.asarray(self._small(layer, "n_patches")[:]).astype(np.int32)

    def pooled(self, layer: int, pool: str = "mean") -> Float[np.ndarray, "clip dim"]:
        """The stored mean, max or min over patches; NaN for failed rows."""
        return np.asarray(self._small(layer, pool)[:])

    def _small(self, layer: int, name: str) -> zarr.Array[Any]:
        path = f"layers/{self.resolve_layer(layer)}/{name}"
        return zarr.open_array(self.path / path, mode="r")

    def places(self, layer: int, kind: str = "patches") -> RowPlaces:
        """Offsets of all rows from the shards' indices.

        Raises `BankCorrupt` where an index is damaged or a row that the clips promise is missing.
        """
        array = self.array(layer, kind)
        shards = range(self.schema.n_shards)
        offset = np.concatenate([self._shard_offsets(array, shard) for shard in shards])
        promised = np.isin(self.status, (DONE, FAILED))
        missing = promised & (offset < 0)
        if missing.any():
            row = int(np.argmax(missing))
            name = array.shard_path(row // self.schema.rows_per_shard)
            raise BankCorrupt(f"shard {name}: row {row} is missing; pull the bank again")
        files = tuple(self.path / array.shard_path(shard) for shard in shards)
        return RowPlaces(array, files, self.schema.rows_per_shard, offset)

    def _shard_offsets(self, array: TokenArray, shard: int) -> Int64[np.ndarray, " slot"]:
        name = array.shard_path(shard)
        layout = array.layout(self.schema.rows_per_shard)
        with (self.path / name).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - layout.index_bytes))
            tail = file.read(layout.index_bytes)
        offsets = parse_index(tail, layout, file_bytes=size, name=name)
        return offsets[: len(self.schema.rows_of(shard))]

    def check_files(self) -> None:
        """Compares every sealed file's size; `BankCorrupt` names the first that differs."""
        for name, size in self._sizes.items():
            path = self.path / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, sealed {size}"
                raise BankCorrupt(
                    f"{self.path}: {name} {what}; pull the bank again, or remove it and extract"
                )


def schema_of_card(card: Json) -> BankSchema:
    """The shapes that a card states."""
    layers, grids = [], {}
    for key, layer in sorted(card["layers"].items(), key=lambda item: int(item[0])):
        layers.append(LayerSpec(int(key), layer["meaning"], layer["dim"], layer["n_prefix"]))
        grids[int(key)] = Grid(**layer["grid"])
    return BankSchema(
        n_rows=card["n_rows"],
        rows_per_shard=card["rows_per_shard"],
        layers=tuple(layers),
        grids=grids,
        dtype=np.dtype(card["stored_dtype"]),
    )


def read_attributes(path: Path) -> Json:
    """The bank attributes of a folder, sealed or not.

    Raises `BankNotFound` where it is no bank, `BankError` for a newer format.
    """
    document = _read_json(path / "zarr.json", what=path)
    attributes = document.get("attributes", {}) if isinstance(document, Mapping) else {}
    if "patchbank_format" not in attributes:
        raise BankNotFound(f"{path} is a Zarr group but no bank: it has no patchbank_format")
    version = attributes["patchbank_format"]
    if version != FORMAT_VERSION:
        raise BankError(
            f"{path} has bank format {version}; this patchbank reads format {FORMAT_VERSION}: "
            "pip install --upgrade patchbank"
        )
    return dict(attributes)


def _read_json(file: Path, *, what: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise BankNotFound(f"no bank at {what}: there is no {file.name}") from None
    except ValueError as error:
        raise BankCorrupt(f"{file} is no JSON: {error}") from error


def require_seal(bank: Path) -> None:
    """Raises `BankIncomplete` where a bank has no seal."""
    if not (bank / SEAL).is_file():
        raise BankIncomplete(
            f"{bank} is not sealed: its extraction has not finished. "
            "Run the same `patchbank extract` command again"
        )


def open_bank(path: Path | str) -> Bank:
    """A sealed bank, after a check of its seal and of every file's size.

    Raises `BankNotFound`, `BankIncomplete` (no seal) or `BankCorrupt`.
    """
    bank = Path(path)
    attributes = read_attributes(bank)
    require_seal(bank)
    seal = _read_json(bank / SEAL, what=bank)
    try:
        opened = _checked_bank(bank, attributes, seal)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BankCorrupt(f"{bank}: the card or the seal is damaged: {error!r}") from error
    opened.check_files()
    return opened


def _checked_bank(bank: Path, attributes: Json, seal: Json) -> Bank:
    if root_hash(seal) != seal["root_sha256"]:
        raise BankCorrupt(f"{bank}: seal.json does not match its own root hash")
    # Everything that is decided later rests on the card; the other files only have to be there.
    card = hash_file(bank / "zarr.json", relative_to=bank)
    if {"path": card.path, "sha256": card.sha256, "size": card.size} not in seal["files"]:
        raise BankCorrupt(f"{bank}: zarr.json is not the one that was sealed; pull the bank again")
    if seal["recipe_id"] != attributes["recipe_id"]:
        raise BankCorrupt(f"{bank}: zarr.json and seal.json name different recipes")
    return Bank(bank, attributes, seal)
