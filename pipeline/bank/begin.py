"""Begins a bank that is made from other banks, or goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from patchbank.pipeline.bank.card import read_attributes
from patchbank.pipeline.bank.commit import recover
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.schema import BankSchema, create_skeleton
from patchbank.pipeline.bank.seal_record import SEAL
from patchbank.pipeline.errors import BankError, BankMismatch
from patchbank.pipeline.specs import Json, differing_fields


def begin_bank(
    out: Path,
    schema: BankSchema,
    attributes: Json,
    constants: Mapping[int, Mapping[str, np.ndarray]],
) -> bool:
    """The skeleton of the bank `out`; False where it is sealed and there is nothing left to do.

    Raises `BankMismatch` where another bank lies there, naming what differs.
    """
    if not (out / "zarr.json").is_file():
        if out.exists():
            raise BankError(f"{out} exists and is no bank; choose another --out or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        create_skeleton(out, schema, attributes, constants)
    found, expected = read_attributes(out), json.loads(json.dumps(attributes))
    if found != expected:
        raise BankMismatch(
            f"{out} holds another bank than this command makes; choose another --out",
            differing_fields(found["card"], expected["card"]),
        )
    if (out / SEAL).is_file():
        return False
    recover(out)
    return True


def shards_as_begun(folder: Path, schema: BankSchema) -> BankSchema:
    """`schema` with as many rows in a shard as a bank that lies at `folder` was begun with.

    That number is chosen when a bank is made; an older patchbank may have chosen another.
    """
    if not (folder / "zarr.json").is_file():
        return schema
    found = read_attributes(folder)["card"].get("rows_per_shard")
    return replace(schema, rows_per_shard=found) if type(found) is int and found > 0 else schema


def derivation(bank: Bank, *, splits: Sequence[str] = ()) -> Json:
    """What a card says of a bank that another one was made from, by `splits` where it was cut."""
    facts: Json = {
        "fingerprint": bank.fingerprint,
        "root_sha256": bank.root_sha256,
        "stored_dtype": bank.schema.stored_dtype,
        "n_clips": bank.n_clips,
        "layers": list(bank.layers),
    }
    return facts | ({"splits": sorted(set(splits))} if splits else {})


def environment_of(card: Json) -> Json:
    """What a bank was computed with, of its card: `extraction` without the batch size."""
    return {key: value for key, value in card["extraction"].items() if key != "batch_size"}
