"""Reads bank format 1, from pipeline/bank/FORMAT.md alone. CRC-32C is pure Python: a table."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [(entry >> 1) ^ (0x82F63B78 if entry & 1 else 0) for entry in CRC_TABLE]
RECIPE = ("encoder", "window", "stored_dtype", "compute_dtype", "mask_padding", "quantisation")
ROW = ("clip_id", "view", "path", "start_s", "duration_s", "audio_sha256", "status")


def crc32c(data: bytes, crc: int = 0xFFFFFFFF) -> int:
    for byte in data:
        crc = (crc >> 8) ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


class FormatReader:
    def __init__(self, bank: Path) -> None:
        self.bank, self.seal = bank, json.loads((bank / "seal.json").read_bytes())
        rest = {key: value for key, value in self.seal.items() if key != "root_sha256"}
        require(sha256(canonical(rest)) == self.seal["root_sha256"], "root hash")
        for file in self.seal["files"]:
            data = (bank / file["path"]).read_bytes()
            require((len(data), sha256(data)) == (file["size"], file["sha256"]), file["path"])
        self.attributes = json.loads((bank / "zarr.json").read_bytes())["attributes"]
        require(self.attributes["patchbank_format"] == self.seal["format"] == 1, "format")
        self.card, self.clips = self.attributes["card"], pq.read_table(bank / "clips.parquet")
        recipe = {name: self.card[name] for name in RECIPE}
        recipe_id = sha256(canonical(recipe | {"layers": sorted(map(int, self.card["layers"]))}))
        lines = b"".join(
            b"\n" + canonical([*r.values()]) for r in self.clips.select(ROW).to_pylist()
        )
        require(sha256(canonical(recipe["encoder"])) == self.attributes["encoder_id"], "encoder_id")
        require(recipe_id == self.attributes["recipe_id"] == self.seal["recipe_id"], "recipe_id")
        require(sha256(recipe_id.encode() + lines) == self.seal["fingerprint"], "fingerprint")

    def row(self, layer: int, row: int, kind: str = "patches") -> np.ndarray:
        slots, dim = self.card["rows_per_shard"], self.card["layers"][str(layer)]["dim"]
        data = (self.bank / f"layers/{layer}/{kind}/c.{row // slots}.0.0").read_bytes()
        index = data[-16 * slots - 4 : -4]
        require(crc32c(index) == int.from_bytes(data[-4:], "little"), "crc32c of the index")
        offset, length = np.frombuffer(index, "<u8").reshape(slots, 2)[row % slots].tolist()
        require(offset + length <= len(data) - len(index) - 4, f"row {row} is missing")
        values, name = data[offset : offset + length], f"{layer}" + "_prefix" * (kind == "prefix")
        require(sha256(values) == self.clips[f"sha256_{name}"][row].as_py(), f"sha256 of row {row}")
        require(crc32c(values) == self.clips[f"crc32c_{name}"][row].as_py(), f"crc32c of row {row}")
        return np.frombuffer(values, self.card["stored_dtype"]).reshape(-1, dim)

    def array(self, path: str) -> np.ndarray:
        """An array without shards: pooled vectors, n_patches, golden."""
        meta = json.loads((self.bank / path / "zarr.json").read_bytes())
        chunk = np.array(meta["chunk_grid"]["configuration"]["chunk_shape"])
        separator = meta["chunk_key_encoding"]["configuration"]["separator"]
        n_chunks = -(-np.array(meta["shape"]) // chunk)
        whole = np.empty(n_chunks * chunk, meta["data_type"])
        for key in np.ndindex(*n_chunks):
            file = self.bank / path / separator.join(["c", *map(str, key)])
            place = tuple(map(slice, key * chunk, key * chunk + chunk))
            whole[place] = np.frombuffer(file.read_bytes(), whole.dtype).reshape(chunk)
        return whole[tuple(map(slice, meta["shape"]))]
