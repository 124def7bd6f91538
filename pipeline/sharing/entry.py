"""What a catalogue says of one bank, and how it is read from strangers' JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.seal_record import as_digest, brief, parse_json
from patchbank.pipeline.specs import Json

VERSION = 1
MOST_ENTRY_BYTES = 64 * 2**10
LONGEST_NAME = 200
LONGEST_NAME_BYTES = 230
"""Of a bank's name: the name of its entry's file, 22 bytes longer, must fit a file system."""
LONGEST_TEXT = 2_000
MOST_LAYERS, MOST_PARENTS, MOST_SIGNERS = 1_000, 1_000, 100
MOST = 2**63
"""More clips or bytes than there are."""
TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Entry:
    """A bank as its own files describe it, and who pushed it when; nothing here is proven."""

    name: str
    """Of its folder."""
    encoder: str
    encoder_id: str
    weights_sha256: str
    """Empty where the encoder has no weight file."""
    layers: tuple[int, ...]
    dtype: str
    archive: bool
    """Whether rows are compressed, for cold storage."""
    pooled_only: bool
    """Whether only means, maxima and minima over patches were kept."""
    clips: int
    bytes: int
    licence: str
    source: str
    fingerprint: str
    """Empty, like `root_sha256`, of a bank that is not sealed; no catalogue has such a one."""
    root_sha256: str
    recipe_id: str
    derived_from: tuple[str, ...] = ()
    """Fingerprints of the banks that it was made from."""
    data: str | None = None
    """Name of the data set, where who pushed it gave one."""
    data_licence: str | None = None
    """Of the data set, where who pushed it gave one."""
    pushed: str | None = None
    """UTC, as 2026-11-26T12:00:00Z."""
    signed_by: tuple[str, ...] = ()
    """Who signed the seal, as claimed at the push: principals or fingerprints of keys."""

    @property
    def is_sealed(self) -> bool:
        return bool(self.root_sha256)

    @property
    def file_name(self) -> str:
        """Of its file in `catalogue/`."""
        return f"{self.name}@{self.root_sha256[:16]}.json"


def entry_of(
    bank: Bank,
    *,
    name: str | None = None,
    data: str | None = None,
    data_licence: str | None = None,
    pushed: datetime | None = None,
    signed_by: Sequence[str] = (),
) -> Entry:
    """The entry of an opened bank, pushed now where no time is given.

    Raises `ValueError` for a name, a data set or a signer that no catalogue takes.
    """
    described = describe(
        name or bank.path.name,
        {"card": bank.card, "encoder_id": bank.encoder_id, "recipe_id": bank.recipe_id},
        fingerprint=bank.fingerprint,
        root_sha256=bank.root_sha256,
        n_bytes=bank.seal.bank_bytes,
    )
    claims = {
        "data": data,
        "data_licence": data_licence,
        "pushed": (pushed or datetime.now(UTC)).astimezone(UTC).strftime(TIME),
        "signed_by": list(signed_by),
    }
    return parse_entry(document_of(described) | claims)


def describe(
    name: str, attributes: Json, *, fingerprint: str, root_sha256: str, n_bytes: int
) -> Entry:
    """What zarr.json of a bank says, as an entry; texts that are too long are cut.

    Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for a damaged card.
    """
    card = attributes["card"]
    encoder, storage = card["encoder"], card.get("storage", "aligned")
    facts = {
        "version": VERSION,
        "name": name,
        "encoder": encoder["name"],
        "encoder_id": attributes["encoder_id"],
        "weights_sha256": encoder["weights_sha256"],
        "layers": sorted(int(layer) for layer in card["layers"]),
        "dtype": card["stored_dtype"],
        "archive": storage == "blosc",
        "pooled_only": storage == "pooled",
        "clips": sum(_count(n_clips, "generations") for n_clips in card["generations"]),
        "bytes": n_bytes,
        "licence": card["licence"][:LONGEST_TEXT],
        "source": card["source"][:LONGEST_TEXT],
        "fingerprint": fingerprint,
        "root_sha256": root_sha256,
        "recipe_id": attributes["recipe_id"],
        "derived_from": [parent["fingerprint"] for parent in card.get("derived_from", [])],
    }
    return parse_entry(facts, is_sealed=bool(root_sha256))


def document_of(entry: Entry) -> Json:
    """The JSON object of an entry."""
    lists = {key: list(value) if isinstance(value, tuple) else value
             for key, value in asdict(entry).items()}  # fmt: skip
    return {"version": VERSION, **lists}


def entry_bytes(entry: Entry) -> bytes:
    """The content of an entry's file, one line."""
    return json.dumps(document_of(entry), sort_keys=True).encode() + b"\n"


def parse_entry_file(content: bytes) -> Entry:
    """`parse_entry` of a file; `ValueError` where it is none."""
    return parse_entry(parse_json(content))


def parse_entry(document: Any, *, is_sealed: bool = True) -> Entry:
    """The entry that a JSON value is; `ValueError` for everything else, with what is wrong."""
    if not isinstance(document, dict):
        raise ValueError(f"{brief(document)} is no entry")
    if document.get("version") != VERSION or isinstance(document["version"], bool):
        raise ValueError(
            f"it has version {brief(document.get('version'))}, this patchbank reads {VERSION}"
        )
    missing = [field.name for field in fields(Entry) if field.name not in document]
    optional = {"derived_from", "data", "data_licence", "pushed", "signed_by"}
    if required := [name for name in missing if name not in optional]:
        raise ValueError(f"it has no {required[0]}")
    digests = {
        name: as_digest(document[name]) if is_sealed else ""
        for name in ("fingerprint", "root_sha256")
    }
    return Entry(
        name=checked_name(document["name"]),
        encoder=_word(document["encoder"], "encoder"),
        encoder_id=as_digest(document["encoder_id"]),
        weights_sha256=_word(document["weights_sha256"], "weights_sha256"),
        layers=_layers(document["layers"]),
        dtype=_word(document["dtype"], "dtype"),
        archive=_claim(document["archive"], "archive"),
        pooled_only=_claim(document["pooled_only"], "pooled_only"),
        clips=_count(document["clips"], "clips"),
        bytes=_count(document["bytes"], "bytes"),
        licence=_text(document["licence"], "licence"),
        source=_text(document["source"], "source"),
        recipe_id=as_digest(document["recipe_id"]),
        derived_from=tuple(
            as_digest(value) for value in _list(document, "derived_from", MOST_PARENTS)
        ),
        data=_word_or_none(document, "data"),
        data_licence=_word_or_none(document, "data_licence"),
        pushed=None if document.get("pushed") is None else _time(document["pushed"]),
        signed_by=tuple(
            _word(value, "signed_by") for value in _list(document, "signed_by", MOST_SIGNERS)
        ),
        **digests,
    )


def checked_name(value: object) -> str:
    """`value` as the name of a bank's folder: one that stays in its folder and on its line."""
    if not is_name(value):
        raise ValueError(f"name {brief(value)} is no name of a bank")
    return str(value)


def is_name(value: object) -> bool:
    """See `checked_name`."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= LONGEST_NAME
        and value.isprintable()
        and len(value.encode()) <= LONGEST_NAME_BYTES
        and not value.startswith(".")
        and not re.search(r"[/\\]", value)
    )


def _word(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_NAME or not value.isprintable():
        raise ValueError(f"{name} is {brief(value)}, expected a printable text")
    return value


def _word_or_none(document: Json, name: str) -> str | None:
    return None if document.get(name) is None else _word(document[name], name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise ValueError(f"{name} is {brief(value)}, expected a text")
    return value


def _claim(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {brief(value)}, expected true or false")
    return value


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < MOST:
        raise ValueError(f"{name} is {brief(value)}, expected a whole number")
    return value


def _list(document: Json, name: str, most: int) -> list[Any]:
    value = document.get(name, [])
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{name} is {brief(value)}, expected a list of at most {most}")
    return value


def _layers(value: Any) -> tuple[int, ...]:
    layers = _list({"layers": value}, "layers", MOST_LAYERS)
    return tuple(_count(layer, "layers") for layer in layers)


def _time(value: Any) -> str:
    text = _word(value, "pushed")
    # `strptime` takes other digits than these, and fewer of them.
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", text):
        raise ValueError(f"pushed is {brief(value)}, expected a time as 2026-11-26T12:00:00Z")
    datetime.strptime(text, TIME).replace(tzinfo=UTC)
    return text
