"""Probe families of installed packages: entry points of the group `patchbank.probes`."""

from __future__ import annotations

from importlib.metadata import entry_points

from patchbank.pipeline.errors import TrialError, told
from patchbank.probing.probes.base import Build
from patchbank.probing.probes.plugin_build import build_of

GROUP = "patchbank.probes"


def installed_probes() -> list[tuple[str, str]]:
    """Name, and package with its version, of every family that is offered; imports none."""
    return sorted(
        (point.name, f"{point.dist.name} {point.dist.version}" if point.dist else "a package")
        for point in entry_points(group=GROUP)
    )


def installed_build(name: str) -> Build | None:
    """The `build` of an installed probe, None where no package offers that name.

    Raises `TrialError` where two do, or where the one that does cannot be imported.
    """
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        return None
    who = [package for offered, package in installed_probes() if offered == name]
    if len(points) > 1:
        raise TrialError(
            f"probe {name!r} is offered by {' and '.join(who)}, expected by one; uninstall the "
            "package that you do not mean"
        )
    try:
        found = points[0].load()
    except Exception as error:
        raise TrialError(
            f"probe {name!r} of {who[0]} cannot be imported from {points[0].value}: "
            f"{told(error)}; repair or uninstall that package"
        ) from error
    return build_of(found, name, f"{points[0].value} of {who[0]}")
