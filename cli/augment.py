"""`--views`, `--augment` and `--augment-seed`: how views are made, as people type it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from patchbank.pipeline.specs import AugmentSpec


def parse_augment(texts: Sequence[str], *, n_views: int, seed: int | None) -> AugmentSpec | None:
    """The augmentations that `--augment mixup` or `--augment gain:min_db=-3,max_db=3` name.

    Exits with 2 for unknown ones, for one named twice, for more views than a bank can number, and
    where views and augmentations are not both given.
    """
    from patchbank.pipeline.errors import PatchbankError
    from patchbank.pipeline.specs import MOST_VIEWS, AugmentSpec

    if not texts:
        if n_views:
            raise typer.BadParameter(
                f"found --views {n_views} without --augment, expected how views are made: add "
                "--augment mixup"
            )
        if seed is not None:
            raise typer.BadParameter(
                "found --augment-seed without --augment, expected what it seeds: --augment mixup"
            )
        return None
    if not n_views:
        raise typer.BadParameter(
            "found --augment without --views, expected how many views a clip gets: add --views 5"
        )
    if n_views > MOST_VIEWS:
        raise typer.BadParameter(f"found --views {n_views}, expected at most {MOST_VIEWS:,}")
    try:
        specs = [_parse(text) for text in texts]
        names = [name for name, _ in specs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise typer.BadParameter(f"found --augment {twice[0]} twice, expected each once")
        return AugmentSpec(**dict(specs), seed=seed or 0)
    except PatchbankError as error:
        raise typer.BadParameter(f"--augment: {error}") from error


def _parse(text: str) -> tuple[str, Any]:
    from patchbank.pipeline.specs import GainSpec, MixupSpec, ShiftSpec

    kinds: dict[str, Any] = {"mixup": MixupSpec, "shift": ShiftSpec, "gain": GainSpec}
    name, _, rest = text.partition(":")
    if name not in kinds:
        raise typer.BadParameter(
            f"found --augment {text!r}, expected {', '.join(kinds)}, or one with parameters: "
            "mixup:p=0.9,max_sources=3"
        )
    known = kinds[name].__dataclass_fields__
    values: dict[str, float] = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        if key not in known:
            raise typer.BadParameter(
                f"found {key!r} in --augment {text}, expected {', '.join(known)}"
            )
        try:
            values[key] = int(value) if isinstance(known[key].default, int) else float(value)
        except ValueError:
            raise typer.BadParameter(
                f"found {pair!r} in --augment {text}, expected a number"
            ) from None
    return name, kinds[name](**values)
