"""What a run trains: probe families with their options, each on one layer or a mix of several."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.probe_files import is_file

MIX = "mix"


@dataclass(frozen=True)
class Entry:
    """One probe of a run."""

    name: str
    """Of its folder and its rows in results.json; no two entries of a run share it."""
    family: str
    """A name of `PROBES`, of an installed package, or the path of a Python file."""
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    """Several are mixed with learned weights; the source's last where none is named."""

    @classmethod
    def of(cls, probe: str | Entry) -> Entry:
        """A family by its name alone, as it is by default."""
        return cls(probe, probe) if isinstance(probe, str) else probe

    @property
    def family_name(self) -> str:
        """What first weights and dropout are seeded with: options and layers change neither."""
        return PurePath(self.family).stem if self.file else self.family

    @property
    def file(self) -> str:
        """The Python file of the family, "" where it is no file."""
        return self.family if is_file(self.family) else ""


def parse_probe(text: str) -> Entry:
    """`protobin`, or with options `protobin:dropout=0.1,n_prototypes_per_class=10`.

    Values are JSON where they can be read as such (numbers, true, null), else text. Raises
    `TrialError`.
    """
    family, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not name or not equals:
            raise TrialError(
                f"found option {part!r} in {text!r}, expected NAME=VALUE, as in "
                "protobin:dropout=0.1,n_prototypes_per_class=10"
            )
        options[name] = _value(value)
    entry = Entry(family, family, options)
    # The name is that of a folder.
    return replace(entry, name="-".join(filter(None, [entry.family_name, rest.replace("/", "_")])))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_layers(texts: Sequence[str], layers: Sequence[int]) -> list[tuple[int, ...]]:
    """What `--layer` names of a bank's `layers`: one layer each, or several that are mixed.

    Commas lie between: `last`, `all` (each by itself), a number, `3+6+12` (these mixed) and `mix`
    (all mixed). Nothing stands for `last`. Raises `TrialError`.
    """
    ordered = sorted(layers)
    found: list[tuple[int, ...]] = []
    items = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    for item in items or ["last"]:
        if item == "last":
            found.append((ordered[-1],))
        elif item == "all":
            found += [(layer,) for layer in ordered]
        elif item == MIX:
            found.append(tuple(ordered))
        else:
            found.append(tuple(_layer(part, item, ordered) for part in item.split("+")))
    return list(dict.fromkeys(tuple(sorted(set(chosen))) for chosen in found))


def _layer(text: str, item: str, layers: Sequence[int]) -> int:
    if text.strip().isdecimal() and int(text) in layers:
        return int(text)
    have = ", ".join(map(str, layers))
    if text.strip().isdecimal():
        raise TrialError(f"found no layer {int(text)} in the bank, expected one of {have}")
    near = difflib.get_close_matches(item, ["last", "all", MIX], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise TrialError(
        f"found layer {item!r}, expected last, all, mix, a number or several as in 3+6, of layers "
        f"{have}{hint}"
    )


def on_layers(entries: Sequence[Entry], chosen: Sequence[tuple[int, ...]]) -> tuple[Entry, ...]:
    """Every entry on every choice of layers, named after both where there are several choices.

    One that has its layers keeps them. Raises `TrialError` where two would have one name.
    """
    placed: list[Entry] = []
    for entry in entries:
        for layers in [()] if entry.layers else chosen:
            several = f"@{'+'.join(map(str, layers))}" if layers and len(chosen) > 1 else ""
            name = f"{entry.name}{several}"
            placed.append(replace(entry, name=name, layers=layers or entry.layers))
    names = [entry.name for entry in placed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TrialError(f"found probe {', '.join(twice)} twice, expected different names")
    return tuple(placed)
