"""Opens a sealed bank: its card, its clips, and where each row's bytes lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Shaped

from patchbank.pipeline.bank.assembly import CLIPS
from patchbank.pipeline.bank.card import checked_schema, read_attributes
from patchbank.pipeline.bank.clip_table import read_clips, read_status
from patchbank.pipeline.bank.places import ADVICE, RowPlaces, read_places
from patchbank.pipeline.bank.quantised import ChannelConstants, constant_files, load_constants
from patchbank.pipeline.bank.row_files import RowFiles, RowReader, read_span
from patchbank.pipeline.bank.schema import (
    FORMAT_VERSION,
    BankSchema,
    SmallArray,
    TokenArray,
)
from patchbank.pipeline.bank.seal_record import SEAL, Seal, read_seal, seal_bytes
from patchbank.pipeline.bank.sealed_sizes import chunk_path, shape_problems
from patchbank.pipeline.bank.view_columns import view_column_problems
from patchbank.pipeline.bank.writer import hash_file
from patchbank.pipeline.errors import BankCorrupt, BankError
from patchbank.pipeline.specs import Json

if TYPE_CHECKING:
    from patchbank.pipeline.bank.rows_view import RowsView


class Bank:
    """A sealed bank, read-only. Use `open_bank`."""

    def __init__(self, path: Path, attributes: Json, seal: Seal, schema: BankSchema) -> None:
        self.path = path
        self.card: Json = attributes["card"]
        self.encoder_id: str = attributes["encoder_id"]
        self.recipe_id: str = attributes["recipe_id"]
        self.seal = seal
        self.schema = schema

    @property
    def where(self) -> str:
        """The place that it was opened from, for messages."""
        return str(self.path)

    @property
    def is_remote(self) -> bool:
        """Whether its tokens lie elsewhere, so that no file of theirs can be mapped."""
        return False

    def files(self, names: Sequence[str]) -> list[Path]:
        """Files of the bank, tokens aside, as files of this disk."""
        return [self.path / name for name in names]

    @property
    def fingerprint(self) -> str:
        return self.seal.fingerprint

    @property
    def root_sha256(self) -> str:
        return self.seal.root_sha256

    @property
    def n_rows(self) -> int:
        """Length of the clip axis: clips, and holes where the bank has grown."""
        return self.schema.n_rows

    @property
    def n_clips(self) -> int:
        """Rows that hold a clip, failed ones included."""
        return self.schema.n_clips

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers in the bank, ascending."""
        return tuple(spec.layer for spec in self.schema.layers)

    @cached_property
    def clips(self) -> pa.Table:
        """clips.parquet, one row a bank row, in order; `BankCorrupt` where it cannot be trusted."""
        with self._as_opened():
            [path] = self.files([CLIPS])
            clips = read_clips(path, self.schema)
            for problem in view_column_problems(clips, self.card, n_clips=self.n_clips):
                raise BankCorrupt(f"{path}: {problem}; {ADVICE}")
            return clips

    @contextmanager
    def _as_opened(self) -> Iterator[None]:
        """Tells a bank that has grown since it was opened from one that is damaged."""
        try:
            yield
        except BankCorrupt as error:
            try:
                has_changed = read_seal(self.path).root_sha256 != self.root_sha256
            except BankError:
                has_changed = not (self.path / SEAL).exists()
            if not has_changed:
                raise
            raise BankError(
                f"{self.path} has grown or was made anew since it was opened; open it again"
            ) from error

    @cached_property
    def status(self) -> Int32[np.ndarray, " row"]:
        """1 done, 2 failed, 3 hole; of all columns of `clips` only this one is read."""
        with self._as_opened():
            status = read_status(self.files([CLIPS])[0], self.schema)
        status.flags.writeable = False
        return status

    def resolve_layer(self, layer: int | None) -> int:
        """`layer`, or the last one where None; `BankError` where the bank lacks it."""
        if layer is None:
            return self.layers[-1]
        if layer not in self.layers:
            raise BankError(f"{self.where} has no layer {layer}; it has {list(self.layers)}")
        return layer

    def array(self, layer: int, kind: str = "patches") -> TokenArray:
        """The sharded array of a layer; `BankError` where there is none of that kind."""
        layer = self.resolve_layer(layer)
        self.require_tokens()
        for array in self.schema.arrays():
            if (array.layer, array.kind) == (layer, kind):
                return array
        raise BankError(f"{self.where}: layer {layer} has no {kind} tokens")

    def require_tokens(self) -> None:
        """Raises `BankError` where the bank holds pooled vectors only."""
        if not self.schema.holds_tokens:
            raise BankError(
                f"{self.where} holds pooled vectors only (mean, max, min), no tokens; "
                "`patchbank bank pull` the bank that it was made from without --pooled-only"
            )

    def n_patches(self, layer: int) -> Int32[np.ndarray, " row"]:
        """Patches that count in each row: 0 in a failed one, -1 in a hole."""
        layer = self.resolve_layer(layer)
        counts = self.small(self._small_array(layer, "n_patches"))
        most = self.schema.grids[layer].n_patches
        wrong = (counts < -1) | (counts > most)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise BankCorrupt(
                f"{self.where}: layers/{layer}/n_patches: row {row} counts {counts[row]} patches "
                f"of {most}; {ADVICE}"
            )
        return counts

    def pooled(self, layer: int, pool: str = "mean") -> Float32[np.ndarray, "row dim"]:
        """The stored mean, max or min over patches; NaN for failed rows and holes."""
        return self.small(self._small_array(layer, pool))

    def scale(self, layer: int) -> Shaped[np.ndarray, "row patch"]:
        """float16, of quantised tokens; `BankError` where the bank's tokens are floats."""
        return self.small(self._small_array(layer, "scale"))

    def constants(self, layer: int) -> ChannelConstants:
        """Channel shift and scale of a quantised layer; checked against the card."""
        self.require_tokens()
        layer = self.resolve_layer(layer)
        with self._as_opened():
            files = self.files(constant_files(layer, self.schema.stored_dtype))
            return load_constants(files, self.card, layer, where=self.where)

    def _small_array(self, layer: int, name: str) -> SmallArray:
        layer = self.resolve_layer(layer)
        for array in self.schema.small_arrays():
            if (array.layer, array.name) == (layer, name):
                return array
        raise BankError(f"{self.where}: layer {layer} has no {name}")

    def small(self, array: SmallArray, rows: range | None = None) -> Shaped[np.ndarray, "row ..."]:
        """Values of an unsharded array for `rows`, all where None.

        Raises `BankCorrupt` where a chunk is not there whole: nothing is filled in.
        """
        rows = range(self.n_rows) if rows is None else rows
        per_chunk = array.chunk_rows(self.n_rows)
        chunks = range(rows.start // per_chunk, -(-rows.stop // per_chunk))
        with self._as_opened():
            paths = self.files([chunk_path(array, chunk) for chunk in chunks])
        out = np.empty((len(rows), *array.row_shape), array.dtype)
        for chunk, path in zip(chunks, paths, strict=True):
            first = chunk * per_chunk
            part = range(max(rows.start, first), min(rows.stop, first + per_chunk))
            inside = range(part.start - first, part.stop - first)
            place = slice(part.start - rows.start, part.stop - rows.start)
            with self._as_opened():
                out[place] = _read_rows(path, array.dtype, array.row_shape, inside, per_chunk)
        return out

    def rows_view(
        self, layer: int | None = None, rows: np.ndarray | Sequence[int] | None = None
    ) -> RowsView:
        """The tokens of a layer, the last where None, as an array that is read when asked for.

        `rows` are row numbers of the bank, in any order; where None, all clean clips (view 0) with
        tokens. Raises `BankError` for a row without tokens.
        """
        from patchbank.pipeline.bank.rows_view import rows_view

        return rows_view(self, layer, rows)

    def places(self, layer: int, kind: str = "patches") -> RowPlaces:
        """Where all rows lie, from the shards' indices: `row_bytes` bytes each.

        Raises `BankCorrupt` where an index is damaged or the row of a clip is missing, `BankError`
        for an archive, whose rows are compressed.
        """
        if self.schema.is_archive:
            raise BankError(
                f"{self.where} is an archive: its tokens are compressed; make a bank of it with "
                f"`patchbank bank convert {self.where} --out ...`"
            )
        return self.stored_places(layer, kind)

    def stored_places(self, layer: int, kind: str = "patches") -> RowPlaces:
        """`places`, of an archive too: where its compressed rows lie."""
        return read_places(self.path, self.schema, self.array(layer, kind))

    def row_reader(self, places: RowPlaces, *, direct: bool, most_open: int) -> RowReader:
        """What reads whole rows into memory, with O_DIRECT or through the page cache."""
        return RowFiles(places, direct=direct, most_open=most_open)

    def stored_rows(self, places: RowPlaces, rows: Sequence[int]) -> list[bytes]:
        """The bytes of some rows as they are stored, unchecked."""
        return [read_span(places.files[places.shard_of(row)], *places.span(row)) for row in rows]

    def __getstate__(self) -> dict[str, Any]:
        # Another process reads the clip table for itself.
        return {k: v for k, v in self.__dict__.items() if k not in ("clips", "status")}

    def check_files(self) -> None:
        """Compares every sealed file's size; `BankCorrupt` names the first that differs."""
        for name, file in self.seal.files.items():
            path = self.path / name
            try:
                found = path.stat().st_size if path.is_file() else None
            except OSError as error:
                raise BankCorrupt(f"{self.path}: {name}: {error.strerror}; {ADVICE}") from error
            if found != file.size:
                what = "is missing" if found is None else f"has {found} bytes, sealed {file.size}"
                raise BankCorrupt(f"{self.path}: {name} {what}; {ADVICE}")


def _read_rows(
    path: Path, dtype: str, row_shape: tuple[int, ...], rows: range, n_rows: int
) -> Shaped[np.ndarray, "row ..."]:
    """Some rows of a chunk file of `n_rows` rows."""
    row_bytes = np.dtype(dtype).itemsize * math.prod(row_shape)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(rows.start * row_bytes)
            content = file.read(len(rows) * row_bytes) if size == n_rows * row_bytes else b""
    except OSError as error:
        raise BankCorrupt(f"{path}: {error.strerror}; {ADVICE}") from error
    if len(content) != len(rows) * row_bytes:
        raise BankCorrupt(f"{path} has {size} bytes, expected {n_rows * row_bytes}; {ADVICE}")
    return np.frombuffer(content, dtype).reshape(len(rows), *row_shape)


def open_bank(path: Path | str) -> Bank:
    """A sealed bank, after a check of its seal and of every file's size.

    Of an address, such as s3://team/banks/x.bank, rows come when they are read, and each is
    compared with its SHA-256. Raises `BankNotFound`, `BankIncomplete` (no seal), `BankCorrupt`, or
    `BankError` where the settings want a signature; `StoreError` where the address cannot be read.
    """
    from patchbank.pipeline.sharing.stores import checked_place, is_url

    path = path if isinstance(path, Path) else checked_place(path)
    if is_url(path):
        from patchbank.pipeline.sharing.remote_bank import open_remote

        return open_remote(str(path))
    bank = Path(path)
    while True:
        seal = seal_bytes(bank)
        opened: Bank | None = None
        problem: BankError | None = None
        try:
            opened = _checked_bank(bank, read_attributes(bank), read_seal(bank))
            opened.check_files()
        except BankError as error:
            problem = error
        if seal_bytes(bank) != seal:
            continue  # it grew meanwhile: what was read may be of two banks
        if problem is not None:
            raise problem
        assert opened is not None
        assert seal is not None
        _check_signed(bank, seal)
        return opened


def _check_signed(bank: Path, seal: bytes) -> None:
    """Raises `BankError` where this user opens signed banks only, and this one is not."""
    from patchbank.pipeline.sharing.settings import load_settings

    if load_settings().require_signature == "open":
        from patchbank.pipeline.sharing.trust import check_opened

        check_opened(bank, seal)


def _checked_bank(bank: Path, attributes: Json, seal: Seal) -> Bank:
    # Everything that is decided later rests on the card; the other files only have to be there.
    if hash_file(bank / "zarr.json", relative_to=bank) != seal.files.get("zarr.json"):
        raise BankCorrupt(f"{bank}: zarr.json is not the one that was sealed; {ADVICE}")
    return Bank(bank, attributes, seal, sealed_schema(attributes, seal, where=str(bank)))


def sealed_schema(attributes: Json, seal: Seal, *, where: str) -> BankSchema:
    """The shapes of a bank whose zarr.json is the sealed one; `BankCorrupt` where seal and card do
    not fit each other. `where` is the bank, for messages."""
    if not seal.matches_root:
        raise BankCorrupt(f"{where}: seal.json does not match its own root hash; {ADVICE}")
    if seal.format != FORMAT_VERSION:
        raise BankCorrupt(f"{where}: {SEAL} has format {seal.format!r}, zarr.json {FORMAT_VERSION}")
    if seal.recipe_id != attributes.get("recipe_id"):
        raise BankCorrupt(f"{where}: zarr.json and seal.json name different recipes; {ADVICE}")
    try:
        schema = checked_schema(attributes)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__} {str(error)[:200]}"
        raise BankCorrupt(f"{where}: the card is damaged: {reason}; {ADVICE}") from error
    for problem in shape_problems(schema, seal):
        raise BankCorrupt(f"{where}: {problem}; {ADVICE}")
    return schema
