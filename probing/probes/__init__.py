"""Probe families by name.

`PROBES` maps a name to its `build(shape, options)`; the docstring of a build function states the
formula and its source. Published parameter counts rest on them and are tested. A probe keeps its
own name in `probe.json`, so a name never changes its meaning.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.abmilp import build_abmilp
from patchbank.probing.probes.base import Build, Options, Probe, ProbeShape
from patchbank.probing.probes.cgp import build_cgp
from patchbank.probing.probes.class_prototypes import build_proto
from patchbank.probing.probes.conv import build_conv
from patchbank.probing.probes.ep import build_ep
from patchbank.probing.probes.installed import installed_build, installed_probes
from patchbank.probing.probes.knn import build_knn
from patchbank.probing.probes.layer_mix import LayerMixProbe
from patchbank.probing.probes.linear import build_linear, build_linear_cls
from patchbank.probing.probes.linpre import build_linpre
from patchbank.probing.probes.mhca import build_mhca
from patchbank.probing.probes.plugin_build import build_of
from patchbank.probing.probes.probe_files import is_file, run_file
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
    """The probe family `name`, or that of a file, for tokens and classes of `shape`.

    Where `shape` has several layers and the family does not mix them, a softmax mix goes in front.
    """
    _, build = find_build(name)
    probe = build(shape, options or {})
    if shape.n_layers == 1 or probe.mixes_layers:
        return probe
    return LayerMixProbe(shape, build(replace(shape, n_layers=1), options or {}))


def find_build(reference: str) -> tuple[str, Build]:
    """A family's name and its `build`; raises `TrialError` where there is none.

    `reference` is a name of `PROBES`; or one of an installed package, an entry point of the group
    `patchbank.probes`, of which only that one is imported; or a file that ends in `.py`, which is
    run and whose stem is the name. Both have `build(shape, options)`.
    """
    if is_file(reference):
        return _build_in_file(reference)
    build = PROBES[reference] if reference in PROBES else installed_build(reference)
    if build is None:
        raise TrialError(
            f"found probe {reference!r}, expected one of {', '.join(PROBES)}{_near(reference)} "
            "(list them with: patchbank probes)"
        )
    return reference, build


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, PROBES, n=1)
    if Path(f"{name}.py").is_file():
        near = [f"{name}.py"]
    return f"; did you mean {near[0]!r}?" if near else ""


def _build_in_file(reference: str) -> tuple[str, Build]:
    name = Path(reference).stem
    # A saved probe is known by its name alone, which must not lead to another family.
    taken = {**dict.fromkeys(PROBES, "a shipped probe"), **dict(installed_probes())}
    if name in taken:
        raise TrialError(
            f"found probe file {reference}, whose name {name!r} is that of {taken[name]}; rename "
            "the file"
        )
    return name, build_of(run_file(reference), name, reference)
