"""`patchbank probes`: what there is, and what each computes."""

from __future__ import annotations

from typing import Annotated

import typer

from patchbank.cli.listing import print_beside, print_entry


def probes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME|FILE.py", help="Tell more of one.")
    ] = None,
    dim: Annotated[int, typer.Option(min=1, help="Width of the tokens.")] = 768,
    classes: Annotated[int, typer.Option(min=1, help="Number of classes.")] = 527,
    grid: Annotated[
        str, typer.Option(metavar="TIMExFREQ", help="Patches of a clip, for probes that ask.")
    ] = "64x8",
    layers: Annotated[int, typer.Option(min=1, help="Layers, for probes that mix them.")] = 1,
) -> None:
    """List the probe families that train-probe knows, or tell formula and options of one.

    Those of installed packages are listed without being imported.
    """
    if name is None:
        _list()
    else:
        _tell(name, dim, classes, _parse_grid(grid), layers)


def _list() -> None:
    import inspect

    from patchbank.probing.probes import PROBES
    from patchbank.probing.probes.installed import installed_probes

    for name, build in sorted(PROBES.items()):
        print_entry(name, "", (inspect.getdoc(build) or "").splitlines()[0])
    for name, package in installed_probes():
        hidden = "; hidden by the shipped probe of that name" * (name in PROBES)
        print_entry(name, "", f"from {package}{hidden}")


def _tell(reference: str, dim: int, classes: int, grid: tuple[int, int], layers: int) -> None:
    import inspect

    from patchbank.probing.probes import find_build
    from patchbank.probing.probes.base import ProbeShape, n_parameters

    _, build = find_build(reference)
    probe = build(ProbeShape(dim, classes, n_prefix=1, grid=grid, n_layers=layers), {})
    text = inspect.getdoc(getattr(build, "function", build)) or "No description."
    for paragraph in text.split("\n\n"):
        print_beside("", " ".join(paragraph.split()))
        print()
    options = [f"{key} = {value}" for key, value in probe.options.items()]
    low, high = probe.learning_rates
    print_beside("options      ", ", ".join(options) or "none")
    print_beside("parameters   ", f"{n_parameters(probe):,} for dim {dim}, {classes} classes")
    print_beside("rates        ", f"{low:g} to {high:g} are worth trying")
    if probe.note:
        print_beside("note         ", probe.note)
    print_beside("check it     ", f"patchbank check {reference}")


def _parse_grid(text: str) -> tuple[int, int]:
    time, _, freq = text.partition("x")
    if not (time.isdecimal() and freq.isdecimal() and int(time) and int(freq)):
        raise typer.BadParameter(f"--grid takes TIMExFREQ, such as 64x8, found {text!r}")
    return int(time), int(freq)
