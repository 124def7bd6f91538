"""What of a bank another one is to hold: some layers, some clips, another type, no tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from patchbank.pipeline.bank.join import join_banks
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.schema import DONE, FAILED, BankSchema, Storage
from patchbank.pipeline.errors import ManifestError, PatchbankError, Problem
from patchbank.pipeline.manifest.sheet import Sheet, read_list
from patchbank.pipeline.plan import schema_for
from patchbank.pipeline.specs import StoredDType

Progress = Callable[[int, int], None]
"""Called with the shards that are done and that there are."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Options of `bank convert` and of a partial `bank pull`, looked up in a bank."""

    layers: tuple[int, ...]
    rows: Int64[np.ndarray, " row"] | None
    """None for all."""
    splits: tuple[str, ...]
    """Those that `rows` were chosen by."""
    dtype: StoredDType
    storage: Storage
    is_compact: bool
    """Rows go into new shards, without holes."""

    def copies_rows(self, bank: Bank) -> bool:
        """Whether rows are written anew; whole files are taken over otherwise."""
        keeps_files = self.storage in (bank.schema.storage, "pooled")
        is_cast = self.dtype != bank.schema.stored_dtype
        return is_cast or not keeps_files or self.rows is not None or self.is_compact

    def schema(self, bank: Bank) -> BankSchema:
        """The shapes of what is made; those of rows that are written anew are made at once."""
        specs = tuple(spec for spec in bank.schema.layers if spec.layer in self.layers)
        grids = {spec.layer: bank.schema.grids[spec.layer] for spec in specs}
        if not self.copies_rows(bank):
            return replace(bank.schema, layers=specs, grids=grids, storage=self.storage)
        n_clips = bank.n_clips if self.rows is None else len(self.rows)
        return schema_for(
            specs, grids, stored_dtype=self.dtype, n_clips=n_clips, storage=self.storage
        )

    def is_all_of(self, bank: Bank) -> bool:
        """Whether nothing would change."""
        same = (self.layers, self.storage) == (bank.layers, bank.schema.storage)
        return same and not self.copies_rows(bank)


def select(
    bank: Bank,
    *,
    layers: str | Sequence[int] = "all",
    splits: Sequence[str] = (),
    clips: Path | None = None,
    dtype: StoredDType | None = None,
    pooled_only: bool = False,
    compact: bool = False,
    archive: bool = False,
) -> Selection:
    """Looks the options up; raises `PatchbankError` for what the bank does not have.

    `layers` are "all", "last", or numbers, also as "3,6,12"; `clips` a table with clip_id or path,
    and view if not all views. What is made of pooled vectors holds pooled vectors.
    """
    pooled = pooled_only or not bank.schema.holds_tokens
    if pooled and (archive or dtype not in (None, bank.schema.stored_dtype)):
        option = "--archive" if archive else f"--dtype {dtype}"
        raise PatchbankError(
            f"{option} is for tokens, and pooled vectors are floats in any bank; leave it out"
        )
    return Selection(
        layers=chosen_layers(bank, layers),
        rows=chosen_rows(bank, splits, clips),
        splits=tuple(sorted(set(splits))),
        dtype=dtype or bank.schema.stored_dtype,
        storage="pooled" if pooled else "blosc" if archive else "aligned",
        is_compact=compact,
    )


def make_selection(source: Bank, out: Path, chosen: Selection, *, progress: Progress) -> Bank:
    """The bank `out` of what was selected, by links where no row has to be written.

    The same call finishes what an earlier one began.
    """
    if not chosen.copies_rows(source):
        pooled_only = chosen.storage == "pooled"
        return join_banks(
            [source], out, layers=chosen.layers, pooled_only=pooled_only, progress=progress
        )
    from patchbank.pipeline.rebuild import rebuild_bank

    return rebuild_bank(
        [source],
        out,
        dtype=chosen.dtype,
        layers=chosen.layers,
        rows=None if chosen.rows is None else [chosen.rows],
        storage=chosen.storage,
        splits=chosen.splits,
        progress=progress,
    )


def chosen_layers(bank: Bank, layers: str | Sequence[int]) -> tuple[int, ...]:
    """The layers that are named; `BankError` where the bank lacks one."""
    if layers == "all":
        return bank.layers
    if layers == "last":
        return bank.layers[-1:]
    if isinstance(layers, str):
        layers = _numbers(layers)
    return tuple(sorted({bank.resolve_layer(int(layer)) for layer in layers}))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PatchbankError(f"found layers {text!r}, expected last, all, or 3,6,12") from None


def chosen_rows(
    bank: Bank, splits: Sequence[str], clips: Path | None
) -> Int64[np.ndarray, " row"] | None:
    """The rows that the options leave, in order; None where they leave all."""
    if not splits and clips is None:
        return None
    keep = np.isin(bank.status, (DONE, FAILED))
    if splits:
        keep &= _of_splits(bank, splits)
    if clips is not None:
        keep &= _named(bank, read_list(clips))
    rows = np.flatnonzero(keep)
    if not len(rows):
        raise PatchbankError(f"no clip of {bank.where} is left; correct --split or --clips")
    return rows


def _of_splits(bank: Bank, splits: Sequence[str]) -> Bool[np.ndarray, " row"]:
    if "split" not in bank.clips.column_names:
        raise PatchbankError(f"{bank.where} has no split column; name clips with --clips")
    there = bank.clips["split"].to_pylist()
    if unknown := sorted(set(splits) - set(there)):
        found = ", ".join(sorted({str(name) for name in there if name is not None}))
        raise PatchbankError(f"no split {unknown[0]!r} in {bank.where}; it has {found}")
    return np.fromiter((name in splits for name in there), bool, len(there))


def _named(bank: Bank, sheet: Sheet) -> Bool[np.ndarray, " row"]:
    """The clips that a table names by `clip_id`, or else `path`, and `view` where it has that."""
    columns = sheet.cells.column_names
    key = "clip_id" if "clip_id" in columns else "path"
    if key not in columns:
        message = f"no such column (clip_id or path: which clip); found {', '.join(columns)}"
        raise ManifestError([Problem(sheet.file, sheet.header_line, key, message)])
    wanted, names = _texts(sheet, key), bank.clips[key].to_pylist()
    known = set(names)
    _refuse(
        sheet,
        key,
        (
            (row, f"no clip of {bank.where} has {key} {name!r}")
            for row, name in enumerate(wanted)
            if name not in known
        ),
    )
    if "view" not in columns:
        chosen = set(wanted)
        return np.fromiter((name in chosen for name in names), bool, len(names))
    views = _texts(sheet, "view")
    keys = list(zip(names, map(str, bank.clips["view"].to_pylist()), strict=True))
    there, pairs = set(keys), set(zip(wanted, views, strict=True))
    _refuse(
        sheet,
        "view",
        (
            (row, f"no view {view!r} of {name!r} in {bank.where}")
            for row, (name, view) in enumerate(zip(wanted, views, strict=True))
            if (name, view) not in there
        ),
    )
    return np.fromiter((one in pairs for one in keys), bool, len(keys))


def _texts(sheet: Sheet, column: str) -> list[str]:
    values = sheet.cells[column].to_pylist()
    return ["" if value is None else str(value).strip() for value in values]


def _refuse(sheet: Sheet, column: str, found: Iterable[tuple[int, str]]) -> None:
    problems = [Problem(sheet.file, sheet.lines[row], column, text) for row, text in found]
    if problems:
        raise ManifestError(problems)
