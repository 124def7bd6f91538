"""Probe families by name.

`PROBES` maps a name to its `build(shape, options)`; the docstring of a build function states the
formula and its source. Published parameter counts rest on them and are tested. A probe keeps its
own name in `probe.json`, so a name never changes its meaning.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.base import Build, Options, Probe, ProbeShape
from patchbank.probing.probes.conv import build_conv
from patchbank.probing.probes.installed import installed_build
from patchbank.probing.probes.knn import build_knn
from patchbank.probing.probes.linear import build_linear, build_linear_cls
from patchbank.probing.probes.linpre import build_linpre
from patchbank.probing.probes.mhca import build_mhca
from patchbank.probing.probes.prototypes import build_protobin, build_protofloat
from patchbank.probing.probes.vectors import build_linearc, build_mlp

PROBES: Mapping[str, Build] = {
    "knn": build_knn,
    "conv": build_conv,
    "linear": build_linear,
    "linear-cls": build_linear_cls,
    "linearc": build_linearc,
    "linpre": build_linpre,
    "mhca": build_mhca,
    "mlp": build_mlp,
    "protobin": build_protobin,
    "protofloat": build_protofloat,
}


def build_probe(name: str, shape: ProbeShape, options: Options | None = None) -> Probe:
    """The probe family `name` for tokens and classes of `shape`; raises `TrialError`.

    A family that is not in `PROBES` comes from an installed package: an entry point of the group
    `patchbank.probes` whose module has `build(shape, options)`. Only that one is imported.
    """
    build = PROBES[name] if name in PROBES else installed_build(name)
    if build is None:
        near = difflib.get_close_matches(name, PROBES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TrialError(
            f"found probe {name!r}, expected one of {', '.join(PROBES)}{hint} "
            "(list them with: patchbank probes)"
        )
    return build(shape, options or {})
