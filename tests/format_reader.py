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
to_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "int8": "i1"}


def crc32c(data: bytes, crc: int = 0xFFFFFFFF) -> int:
    for byte in data:
        crc = (crc >> 8) ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


class FormatReader:
    def __init__(self, bank: Path) -> None:
        self.bank, self.seal = bank, json.loads((bank / "seal.json").read_bytes())
        for file in self.seal["files"]:
            data = (bank / file["path"]).read_bytes()
            found = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            require(file == {"path": file["path"], **found}, file["path"])
        self.attributes = json.loads((bank / "zarr.json").read_bytes())["attributes"]
        self.card, self.clips = self.attributes["card"], pq.read_table(bank / "clips.parquet")
        require(self.attributes["patchbank_format"] == self.seal["format"] == 1, "format")
        recipe = {name: self.card[name] for name in RECIPE}
        recipe |= {"layers": sorted(map(int, self.card["layers"]))}
        rows = [list(row.values()) for row in self.clips.select(ROW).to_pylist()]
        lines = [self.seal["recipe_id"], *(to_json(row) for row in rows if row[-1] != 3)]
        root = {key: value for key, value in self.seal.items() if key != "root_sha256"}
        texts = {"fingerprint": "\n".join(lines), "root_sha256": to_json(root)}
        texts |= {"recipe_id": to_json(recipe), "encoder_id": to_json(recipe["encoder"])}
        for name, text in texts.items():
            found = hashlib.sha256(text.encode()).hexdigest()
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
        require(hashlib.sha256(values).hexdigest() == expected, f"sha256 of row {row}")
        dtype = DTYPES["float16" if (stored, kind) == ("int8", "prefix") else stored]
        return np.frombuffer(values, dtype).reshape(-1, self.card["layers"][str(layer)]["dim"])

    def floats(self, layer: int, row: int, kind: str = "patches") -> np.ndarray:
        tokens, names = self.row(layer, row, kind), ("scale", "channel_scale", "channel_shift")
        if tokens.dtype.kind != "i":
            return (tokens.astype("<u4") << 16).view("<f4") if tokens.dtype == "<u2" else tokens
        scale, channel_scale, shift = (self.array(f"layers/{layer}/{name}") for name in names)
        return tokens * scale[row].astype("<f4")[:, None] * channel_scale + shift

    def array(self, path: str) -> np.ndarray:
        meta = json.loads((self.bank / path / "zarr.json").read_bytes())
        chunk = np.array(meta["chunk_grid"]["configuration"]["chunk_shape"])
        whole = np.empty(-(-np.array(meta["shape"]) // chunk) * chunk, meta["data_type"])
        for key in np.ndindex(*(whole.shape // chunk)):
            file = self.bank / path / ".".join(["c", *map(str, key)])
            place = tuple(map(slice, key * chunk, key * chunk + chunk))
            whole[place] = np.fromfile(file, whole.dtype).reshape(chunk)
        return whole[tuple(map(slice, meta["shape"]))]
