"""Where and with what a benchmark ran."""

from __future__ import annotations

import os
import platform
import shutil
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from patchbank.probing.tiers import free_memory_bytes

PACKAGES = (
    "patchbank",
    "torch",
    "numpy",
    "zarr",
    "zarrs",
    "h5py",
    "webdataset",
    "litdata",
    "datasets",
    "pyarrow",
)


def machine_facts(folder: Path) -> dict[str, Any]:
    """Cores, memory, kernel, the folder's disk, versions, and how busy the machine was."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "free_ram_bytes": free_memory_bytes(),
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system": _file_system(folder),
        "free_disk_bytes": shutil.disk_usage(folder).free,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts as two lines of text."""
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items())
    return (
        f"{facts['date']}: {facts['cores']} cores ({facts['processor']}), load "
        f"{facts['load_average']:.1f}, {facts['ram_bytes'] / 2**30:.0f} GiB RAM, Linux "
        f"{facts['kernel']}, {facts['file_system']}\nPython {facts['python']}, {versions}"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _file_system(folder: Path) -> str:
    """Type and device of the mount that holds a folder."""
    place, best = str(folder.resolve()), ("", "unknown", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        device, mount, kind = line.split()[:3]
        if (place + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(best[0]):
            best = (mount, kind, device)
    return f"{best[1]} on {best[2]}"
