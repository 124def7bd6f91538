"""Probe families by name.

`PROBES` maps a name to its `build(shape, options)`; the docstring of a build function states the
formula and its source. Published parameter counts rest on them and are tested. A probe keeps its
own name in `probe.json`, so a name never changes its meaning.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.abmilp import build_abmilp
from patchbank.probing.probes.base import Build, Options, Probe, ProbeShape
from patchbank.probing.probes.cgp import build_cgp
from patchbank.probing.probes.class_prototypes import build_proto
from patchbank.probing.probes.conv import build_conv
from patchbank.probing.probes.ep import build_ep
from patchbank.probing.probes.installed import installed_build
from patchbank.probing.probes.knn import build_knn
from patchbank.probing.probes.layer_mix import LayerMixProbe
from patchbank.probing.probes.linear import build_linear, build_linear_cls
from patchbank.probing.probes.linpre import build_linpre
from patchbank.probing.probes.mhca import build_mhca
from patchbank.probing.probes.prototypes import build_protobin, build_protofloat
from patchbank.probing.probes.simpool import build_simpool
from patchbank.probing.probes.vectors import build_linearc, build_mlp

PROBES: Mapping[str, Build] = {
    "linear": build_linear,
    "linear-cls": build_linear_cls,
    "mlp": build_mlp,
    "linearc": build_linearc,
    "linpre": build_linpre,
    "conv": build_conv,
    "mhca": build_mhca,
    "ep": build_ep,
    "simpool": build_simpool,
    "abmilp": build_abmilp,
    "proto": build_proto,
    "protobin": build_protobin,
    "protofloat": build_protofloat,
    "cgp": build_cgp,
    "knn": build_knn,
}


def build_probe(name: str, shape: ProbeShape, options: Options | None = None) -> Probe:
    """The probe family `name` for tokens and classes of `shape`; raises `TrialError`.

    A family that is not in `PROBES` comes from an installed package: an entry point of the group
    `patchbank.probes` whose module has `build(shape, options)`. Only that one is imported. Where
    `shape` has several layers and the family does not mix them, a softmax mix goes in front.
    """
    build = PROBES[name] if name in PROBES else installed_build(name)
    if build is None:
        near = difflib.get_close_matches(name, PROBES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TrialError(
            f"found probe {name!r}, expected one of {', '.join(PROBES)}{hint} "
            "(list them with: patchbank probes)"
        )
    probe = build(shape, options or {})
    if shape.n_layers == 1 or probe.mixes_layers:
        return probe
    return LayerMixProbe(shape, build(replace(shape, n_layers=1), options or {}))
