"""Rows of sealed banks: their clips, and the bytes of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Shaped

from patchbank.pipeline.bank.archive import decompress
from patchbank.pipeline.bank.identity import digest_columns
from patchbank.pipeline.bank.layout import crc32c
from patchbank.pipeline.bank.places import ADVICE, RowPlaces
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.schema import BankSchema, SmallArray, TokenArray
from patchbank.pipeline.errors import BankCorrupt


class BankRows:
    """The rows of a sealed bank on their way into another one; see `assembly.RowSource`."""

    def __init__(self, bank: Bank, schema: BankSchema | None = None) -> None:
        """`schema` is that of the bank that they go to, where it has fewer layers."""
        self._bank = bank
        kept = set(digest_columns((schema or bank.schema).described_arrays()))
        dropped = set(digest_columns(bank.schema.described_arrays())) - kept
        self._columns = [name for name in bank.clips.column_names if name not in dropped]
        self.n_rows = bank.n_rows

    def small(self, array: SmallArray, rows: range) -> Shaped[np.ndarray, "row ..."]:
        return self._bank.small(array, rows)

    def clips(self, rows: range) -> pa.Table:
        return self._bank.clips.slice(rows.start, len(rows)).select(self._columns)


class RowBytes:
    """The tokens of one array as they lie on disk, each row checked as it is read."""

    def __init__(self, bank: Bank, array: TokenArray) -> None:
        self._bank, self._array = bank, array
        self._places: RowPlaces = bank.stored_places(array.layer, array.kind)
        self._crc32c: Sequence[int | None] = bank.clips[f"crc32c_{array.column_suffix}"].to_pylist()

    def read(self, row: int) -> Shaped[np.ndarray, "token dim"]:
        """The stored tokens of a row; `BankCorrupt` where they are not those of its checksum."""
        return self.read_all([row])[0]

    def read_all(self, rows: Sequence[int]) -> list[Shaped[np.ndarray, "token dim"]]:
        """The same of several, which come together where they come from afar."""
        stored = self._bank.stored_rows(self._places, rows)
        return [self._checked(row, data) for row, data in zip(rows, stored, strict=True)]

    def _checked(self, row: int, data: bytes) -> Shaped[np.ndarray, "token dim"]:
        array = self._array
        try:
            tokens = self._decoded(data)
            if crc32c(tokens) != self._crc32c[row]:
                raise ValueError("the bytes do not match their checksum")
        except ValueError as error:
            name = array.shard_path(self._places.shard_of(row))
            raise BankCorrupt(
                f"{self._bank.where}: shard {name}, row {row}: {error}; {ADVICE}"
            ) from error
        return np.frombuffer(tokens, array.dtype).reshape(array.n_tokens, array.width)

    def _decoded(self, data: bytes) -> bytes:
        if self._bank.schema.is_archive:
            return decompress(data, row_bytes=self._array.row_bytes)
        if len(data) != self._array.row_bytes:
            raise ValueError(f"{len(data)} bytes, expected {self._array.row_bytes}")
        return data


class TokenFloats:
    """The tokens of one array as float32, whatever they are stored as."""

    def __init__(self, bank: Bank, array: TokenArray) -> None:
        self._bytes, self._stored, self._bank = RowBytes(bank, array), array.stored, bank
        self._constants = bank.constants(array.layer) if array.stored.is_quantised else None
        self._scales = [
            small
            for small in bank.schema.small_arrays()
            if (small.layer, small.name) == (array.layer, "scale")
        ]

    def read(self, row: int) -> Float32[np.ndarray, "token dim"]:
        return self.read_all([row])[0]

    def read_all(self, rows: Sequence[int]) -> list[Float32[np.ndarray, "token dim"]]:
        """The tokens of several rows, which come together where they come from afar."""
        stored = self._bytes.read_all(rows)
        return [self._floats(row, tokens) for row, tokens in zip(rows, stored, strict=True)]

    def _floats(
        self, row: int, tokens: Shaped[np.ndarray, "token width"]
    ) -> Float32[np.ndarray, "token dim"]:
        if self._constants is None:
            return self._stored.to_float(tokens).astype(np.float32)
        scale = self._bank.small(self._scales[0], range(row, row + 1))[0]
        return self._constants.dequantise(self._stored.to_codes(tokens), scale)
