"""`patchbank probes`: what there is."""

from __future__ import annotations


def probes() -> None:
    """List the probe families that train-probe knows."""
    from patchbank.probing.probes import PROBES

    for name, module in sorted(PROBES.items()):
        print(f"{name:<14} {module}")
