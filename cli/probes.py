"""`patchbank probes`: what there is."""

from __future__ import annotations

from patchbank.cli.listing import print_entry


def probes() -> None:
    """List the probe families that train-probe knows."""
    import inspect

    from patchbank.probing.probes import PROBES

    for name, build in sorted(PROBES.items()):
        print_entry(name, "", (inspect.getdoc(build) or "").splitlines()[0])
