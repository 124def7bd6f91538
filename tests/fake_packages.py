"""Installed packages that are not: a dist-info folder with entry points, and modules beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Install:
    """A folder on the path into which packages are laid."""

    folder: Path

    def __call__(
        self, package: str, points: Mapping[str, str], *, group: str = "patchbank.encoders"
    ) -> Path:
        """Version 1.2 of a package with those entry points; returns the folder of its modules."""
        info = self.folder / f"{package}-1.2.dist-info"
        write(info / "METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        write(info / "entry_points.txt", "\n".join([f"[{group}]", *lines, ""]))
        return self.folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
