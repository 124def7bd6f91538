"""Members of an uncompressed tar, read where they lie."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from patchbank.pipeline.containers.byte_stretch import ByteStretch, file_stretch
from patchbank.pipeline.containers.index_cache import IndexCache
from patchbank.pipeline.errors import AudioError

COMPRESSED_SUFFIXES = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.z"),
)
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
_MOST_MEMBERS = 500_000
"""Of all indices kept in a process: about 150 MiB."""


@dataclass(frozen=True)
class TarIndex:
    """Where the files of a tar lie."""

    stretches: Mapping[str, tuple[int, int]]
    """First byte and size of each file, by its tidy name, in the order of the tar."""
    troubles: Mapping[str, str]
    """Names that stand for no readable file, and why."""
    damage: str | None
    """Where and why reading the tar ended before its end."""

    def __len__(self) -> int:
        return len(self.stretches) + len(self.troubles)

    def trouble(self, member: str) -> str | None:
        """Why there is no file called `member`; None where there is one."""
        if member in self.stretches:
            return None
        missing = f"there is no member {member!r} in it"
        return self.troubles.get(member, f"{missing}; {self.damage}" if self.damage else missing)


def read_tar_index(path: Path) -> TarIndex:
    """The index of a tar by its headers, without its data; `AudioError` for what is no tar."""
    with path.open("rb", buffering=0) as file:
        if program := _decompressor(path, file.read(8)):
            raise AudioError(
                f"a compressed tar cannot be read at random; unpack it: {program} {path.name}"
            )
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                return _index_of(tar, file.fileno())
        except tarfile.TarError as error:
            raise AudioError(f"is no tar that can be read: {error}") from error


def _decompressor(path: Path, head: bytes) -> str | None:
    for magic, program in _COMPRESSED.items():
        if head.startswith(magic):
            return program
    return "tar xf" if path.name.lower().endswith(COMPRESSED_SUFFIXES) else None


def _index_of(tar: tarfile.TarFile, descriptor: int) -> TarIndex:
    stretches: dict[str, tuple[int, int]] = {}
    troubles: dict[str, str] = {}
    damage = None
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps a KiB for each
            if member.isdir():
                continue
            name = posixpath.normpath(member.name)
            if name in stretches or name in troubles:
                stretches.pop(name, None)
                troubles[name] = "stands twice in the tar; give each member a name of its own"
            elif trouble := _member_trouble(member):
                troubles[name] = trouble
            else:
                stretches[name] = (member.offset_data, member.size)
    except tarfile.TarError:
        damage = _damage(tar.offset)
    # A damaged header ends tarfile's loop as if it were the end; that is two blocks of zeros.
    if os.pread(descriptor, tarfile.BLOCKSIZE, tar.offset).strip(b"\0"):
        damage = _damage(tar.offset)
    return TarIndex(stretches, troubles, damage)


def _damage(position: int) -> str:
    return f"the tar is cut off or damaged at byte {position}; copy it again"


def _member_trouble(member: tarfile.TarInfo) -> str | None:
    if member.issym() or member.islnk():
        return f"is a link to {member.linkname!r}; pack the file itself (tar --dereference)"
    if member.issparse():
        return "is a sparse member; pack it without --sparse"
    if not member.isreg():
        return "is no file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "leads out of the tar; pack it under a name without '..' and leading '/'"
    try:
        member.name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8; pack it under another name"
    return None


TARS = IndexCache(lambda path, _: read_tar_index(path), most=_MOST_MEMBERS)


def open_tar_member(path: Path, member: str) -> ByteStretch:
    """The bytes of a member; `AudioError` where there is none that is whole."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        index = TARS.get(path, status)
        if trouble := index.trouble(member):
            raise AudioError(trouble)
        start, size = index.stretches[member]
        if start + size > status.st_size:
            raise AudioError("the tar is cut off in the middle of this member; copy it again")
    except BaseException:
        os.close(descriptor)
        raise
    return file_stretch(descriptor, start, size)
