"""`patchbank probes`: what there is."""

from __future__ import annotations

from patchbank.cli.listing import print_entry


def probes() -> None:
    """List the probe families that train-probe knows.

    Those of installed packages are named without being imported.
    """
    import inspect

    from patchbank.probing.probes import PROBES
    from patchbank.probing.probes.installed import installed_probes

    for name, build in sorted(PROBES.items()):
        print_entry(name, "", (inspect.getdoc(build) or "").splitlines()[0])
    for name, package in installed_probes():
        hidden = "; hidden by the shipped probe of that name" * (name in PROBES)
        print_entry(name, "", f"from {package}{hidden}")
