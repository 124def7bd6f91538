"""Reads bank format 1, from pipeline/bank/FORMAT.md alone. CRC-32C is pure Python: a table."""

import json
from functools import reduce
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [(entry >> 1) ^ (0x82F63B78 if entry & 1 else 0) for entry in CRC_TABLE]
RECIPE = ("encoder", "window", "stored_dtype", "compute_dtype", "mask_padding", "quantisation")
ROW = ("clip_id", "view", "path", "start_s", "duration_s", "audio_sha256", "status")
to_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "int8": "i1", "int4": "u1"}


def crc32c(data: bytes) -> int:
    return reduce(lambda c, b: (c >> 8) ^ CRC_TABLE[(c ^ b) & 255], data, 2**32 - 1) ^ (2**32 - 1)


def require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


class FormatReader:
    def __init__(self, bank: Path) -> None:
        self.bank, self.seal = bank, json.loads((bank / "seal.json").read_bytes())
        for f in self.seal["files"]:
            data = (bank / f["path"]).read_bytes()
            require(f == {**f, "size": len(data), "sha256": sha256(data).hexdigest()}, f["path"])
        self.attributes = json.loads((bank / "zarr.json").read_bytes())["attributes"]
        self.card, self.clips = self.attributes["card"], pq.read_table(bank / "clips.parquet")
        require(self.attributes["patchbank_format"] == self.seal["format"] == 1, "format")
        recipe = {key: self.card[key] for key in (*RECIPE, "augment") if key in self.card}
        recipe["layers"] = sorted(map(int, self.card["layers"]))
        rows = [list(row.values()) for row in self.clips.select(ROW).to_pylist()]
        lines = [self.seal["recipe_id"], *(to_json(row) for row in rows if row[-1] != 3)]
        root = {key: value for key, value in self.seal.items() if key != "root_sha256"}
        texts = {"fingerprint": "\n".join(lines), "root_sha256": to_json(root)}
        texts |= {"recipe_id": to_json(recipe), "encoder_id": to_json(recipe["encoder"])}
        for name, text in texts.items():
            found = sha256(text.encode()).hexdigest()
            require({self.seal.get(name, found), self.attributes.get(name, found)} == {found}, name)

    def row(self, layer: int, row: int, kind: str = "patches") -> np.ndarray:
        slots, stored = self.card["rows_per_shard"], self.card["stored_dtype"]
        data = (self.bank / f"layers/{layer}/{kind}/c.{row // slots}.0.0").read_bytes()
        index = data[-16 * slots - 4 : -4]
        require(crc32c(index) == int.from_bytes(data[-4:], "little"), "crc32c of the index")
        offset, length = np.frombuffer(index, "<u8").reshape(slots, 2)[row % slots].tolist()
        require(offset + length <= len(data) - len(index) - 4, f"row {row} is missing")
        values, name = data[offset : offset + length], f"{layer}" + "_prefix" * (kind == "prefix")
        expected = self.clips[f"sha256_{name}"][row].as_py()
        require(sha256(values).hexdigest() == expected, f"sha256 of row {row}")
        dtype = DTYPES["float16" if kind == "prefix" and stored.startswith("int") else stored]
        width = self.card["layers"][str(layer)]["dim"] // (2 if dtype == "u1" else 1)
        return np.frombuffer(values, dtype).reshape(-1, width)

    def floats(self, layer: int, row: int, kind: str = "patches") -> np.ndarray:
        tokens, names = self.row(layer, row, kind), ("scale", "channel_scale", "channel_shift")
        if tokens.dtype in ("<u2", "<f2", "<f4"):
            return (tokens.astype("<u4") << 16).view("<f4") if tokens.dtype == "<u2" else tokens
        scale, channel_scale, shift = (self.array(f"layers/{layer}/{name}") for name in names)
        if tokens.dtype == "u1":
            rotation = self.array(f"layers/{layer}/rotation")
            pairs = np.stack([tokens & 15, tokens >> 4], -1) - np.float32(8)
            tokens = (pairs.reshape(-1, len(rotation)) @ rotation).reshape(len(tokens), -1)
        return tokens * scale[row].astype("<f4")[:, None] * channel_scale + shift

    def array(self, path: str) -> np.ndarray:
        meta = json.loads((self.bank / path / "zarr.json").read_bytes())
        shape, chunk = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
        names = [f"c.{k}" + ".0" * (len(shape) - 1) for k in range(-(-shape[0] // chunk[0]))]
        chunks = [np.fromfile(self.bank / path / name, meta["data_type"]) for name in names]
        return np.concatenate(chunks).reshape(-1, *shape[1:])[: shape[0]]
