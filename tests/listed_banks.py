"""Banks as a listing sees them: a card and a seal, whose other files nobody looks at."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.bank.card import attributes_of_card
from patchbank.pipeline.bank.identity import root_hash
from patchbank.pipeline.sharing.folder_store import FolderStore


def write_listed(sealed: Bank, folder: Path, *, licence: str = "MIT", n_clips: int = 40) -> Path:
    """The card of `sealed` with another licence and number of clips, sealed, at `folder`."""
    card = sealed.card | {"licence": licence, "generations": [n_clips]}
    content = json.dumps({"attributes": attributes_of_card(card)}).encode()
    files = [{"path": name, "size": file.size, "sha256": file.sha256}
             for name, file in sealed.seal.files.items() if name != "zarr.json"]  # fmt: skip
    own = {"path": "zarr.json", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal = {
        "format": 1,
        "recipe_id": attributes_of_card(card)["recipe_id"],
        "fingerprint": hashlib.sha256(folder.name.encode()).hexdigest(),
        "files": sorted([*files, own], key=lambda file: str(file["path"])),
    }
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_bytes(content)
    seal |= {"root_sha256": root_hash(seal)}
    (folder / "seal.json").write_text(json.dumps(seal, sort_keys=True))
    return folder


class Watched(FolderStore):
    """A folder that remembers which documents were asked for."""

    def __init__(self, folder: Path, asked: list[str] | None = None) -> None:
        super().__init__(folder)
        self.asked: list[str] = [] if asked is None else asked

    def below(self, part: str) -> Watched:
        return Watched(self.folder / part, self.asked)

    def document(self, name: str, *, most_bytes: int) -> bytes | None:
        self.asked.append(f"{self.folder.name}/{name}")
        return super().document(name, most_bytes=most_bytes)


class Unlisted(FolderStore):
    """A folder that does not tell what it holds, as a web server."""

    can_list = False
    is_writable = False
