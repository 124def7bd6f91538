"""What a person may choose of a training run: defaults, then a preset, then a file, then flags.

The names are those of `patchbank train-probe`; a TOML file may hold any of them.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from patchbank.pipeline.errors import TrialError
from patchbank.probing.entries import Entry, on_layers, parse_layers, parse_probe
from patchbank.probing.labels import TaskKind
from patchbank.probing.probes.probe_files import is_file
from patchbank.probing.settings import Range, SearchSettings, TrainSettings
from patchbank.probing.tiers import Tier

PRESETS = ("bat", "unmute")
_SETTINGS, _SEARCH = TrainSettings(), SearchSettings()
Table = dict[str, Any]


class _Strict(BaseModel):
    # Not strict about lists and tuples, of which TOML and JSON know one.
    model_config = ConfigDict(frozen=True, extra="forbid")


class SearchOptions(_Strict):
    """The table [search]: `SearchSettings` without the number of its first trials, `sweep`."""

    first: Literal["spread", "sobol"] = _SEARCH.first
    n_rounds: int = _SEARCH.n_rounds
    n_a_round: int = _SEARCH.n_a_round
    halving_epochs: tuple[int, ...] = _SEARCH.halving_epochs
    keep: float = _SEARCH.keep
    learning_rates: dict[str, Range] = Field(default_factory=dict)
    weight_decays: Range = _SEARCH.weight_decays
    seed: int = _SEARCH.seed


class TrainOptions(_Strict):
    """Every choice of a run but its bank and its folder; paths as a file states them."""

    probe: tuple[str, ...] = ("linear", "protobin")
    layer: tuple[str, ...] = ("last",)
    labels: tuple[Path, ...] = ()
    splits: Path | None = None
    folds: str | None = None
    classes: Path | None = None
    task: TaskKind = "auto"
    allow_unlabelled: bool = False
    no_views: bool = False
    group: str | None = None
    allow_leakage: bool = False
    epochs: int = _SETTINGS.n_epochs
    steps: int | None = _SETTINGS.n_steps
    batch_size: int = _SETTINGS.batch_size
    seeds: int = _SETTINGS.n_seeds
    sweep: int = _SEARCH.n_candidates
    lr: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    warmup_steps: int = _SETTINGS.n_warmup_steps
    lowest_rate: float = _SETTINGS.lowest_rate
    loss: Literal["auto", "asymmetric", "bce", "cross-entropy"] = _SETTINGS.loss
    gamma_negative: float = _SETTINGS.gamma_negative
    gamma_positive: float = _SETTINGS.gamma_positive
    clip: float = _SETTINGS.clip
    order_seed: int = _SETTINGS.order_seed
    n_resamples: int = _SETTINGS.n_resamples
    device: str = _SETTINGS.device
    dtype: Literal["float32", "float64"] = _SETTINGS.dtype
    tier: Tier = "auto"
    search: SearchOptions = Field(default_factory=SearchOptions)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of probe families, where `probe` does not state them itself."""

    @classmethod
    def resolve(
        cls,
        flags: Mapping[str, Any],
        *,
        file: Path | None = None,
        preset: str | None = None,
    ) -> TrainOptions:
        """The defaults under a preset, under a file (which may name a preset), under `flags`.

        Flags that are None or empty lists were not given. Raises `TrialError` for what no option is
        called, and for values of another kind.
        """
        table = {} if file is None else _read_file(file)
        named = table.pop("preset", None)
        given = {name: value for name, value in flags.items() if value not in (None, [])}
        layers = [_read_preset(preset or named) if preset or named else {}, table, given]
        _check_flags(given)
        merged: Table = {}
        for origin, layer in zip((preset or named, file, "command line"), layers, strict=True):
            _validated(layer, str(origin))
            _give_way(merged, layer)
            _merge(merged, layer)
        return _validated(merged, "options")

    def entries(self, layers: Sequence[int]) -> tuple[list[Entry], list[tuple[int, ...]]]:
        """The probes with their options, and the choices among a bank's `layers`."""
        entries = [parse_probe(text) for text in dict.fromkeys(self.probe)]
        families = {entry.family_name for entry in entries}
        _check_families("options", self.options, families)
        names = families | {entry.name for entry in entries}
        _check_families("search.learning_rates", self.search.learning_rates, names)
        filled = [
            replace(entry, options={**self.options.get(entry.family_name, {}), **entry.options})
            for entry in entries
        ]
        return filled, parse_layers(self.layer, layers)

    def settings(self, layers: Sequence[int]) -> TrainSettings:
        """The settings of a run on a bank's `layers`."""
        names = [entry.name for entry in on_layers(*self.entries(layers))]
        search = SearchSettings(n_candidates=self.sweep, **self.search.model_dump())
        return TrainSettings(
            n_epochs=self.epochs,
            n_steps=self.steps,
            batch_size=self.batch_size,
            n_seeds=self.seeds,
            search=search,
            learning_rates=dict.fromkeys(names, self.lr) if self.lr else {},
            weight_decays=dict.fromkeys(names, self.weight_decay) if self.weight_decay else {},
            n_warmup_steps=self.warmup_steps,
            lowest_rate=self.lowest_rate,
            loss=self.loss,
            gamma_negative=self.gamma_negative,
            gamma_positive=self.gamma_positive,
            clip=self.clip,
            order_seed=self.order_seed,
            n_resamples=self.n_resamples,
            device=self.device,
            dtype=self.dtype,
        )

    def to_toml(self, folder: Path) -> str:
        """A file for `folder` that means the same, every option written out."""
        import tomli_w

        def seen(path: Path) -> Path:
            return Path(os.path.relpath(path, folder))

        paths = {
            "labels": tuple(map(seen, self.labels)),
            "splits": self.splits and seen(self.splits),
            "classes": self.classes and seen(self.classes),
        }
        table = self.model_copy(update=paths).model_dump(mode="json", exclude_none=True)
        return tomli_w.dumps(table)


def _read_file(path: Path) -> Table:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrialError(f"cannot read {path} ({error.strerror}), expected a TOML file") from error
    except ValueError as error:
        raise TrialError(f"{path}: {error}, expected TOML") from error
    _check_runs_nothing(table, path)
    for name in ("labels", "splits", "classes"):
        # Paths of a file are seen from where it lies.
        if isinstance(table.get(name), str):
            table[name] = str(path.parent / table[name])
        elif isinstance(table.get(name), list):
            table[name] = [str(path.parent / one) for one in table[name] if isinstance(one, str)]
    return table


def _read_preset(name: str) -> Table:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TrialError(f"found preset {name!r}, expected one of {', '.join(PRESETS)}{hint}")
    text = files("patchbank.data").joinpath("presets", f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _validated(table: Mapping[str, Any], origin: str) -> TrainOptions:
    try:
        # JSON, because a number in quotes is none there.
        return TrainOptions.model_validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        raise TrialError(
            "\n".join(f"{origin}: {_told(one)}" for one in error.errors(include_url=False))
        ) from error


def _told(error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        found = error["input"]
        return f"{place}: found {found!r}; {error['msg'][0].lower()}{error['msg'][1:]}"
    fields = (
        SearchOptions.model_fields if place.startswith("search.") else TrainOptions.model_fields
    )
    near = difflib.get_close_matches(str(error["loc"][-1]), fields, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"found {place!r}, expected an option of train-probe{hint}"


def _give_way(below: Table, above: Mapping[str, Any]) -> None:
    """What says the same in another way is not to outlive what is put above it."""
    if "epochs" in above:
        below.pop("steps", None)
    if "sweep" in above:
        below.pop("lr", None)
        below.pop("weight_decay", None)


def _merge(below: Table, above: Mapping[str, Any]) -> None:
    """Puts `above` over `below`, tables key by key."""
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value


def _check_flags(given: Mapping[str, Any]) -> None:
    if "lr" in given and "sweep" in given:
        raise TrialError(
            "found both --lr and --sweep, expected one of them: values that are given are all that "
            "is tried"
        )


def _check_runs_nothing(table: Table, path: Path) -> None:
    """A file may come from anybody; what Python is run, only a person's own words say."""
    probes = table.get("probe")
    for text in probes if isinstance(probes, list) else [probes]:
        if isinstance(text, str) and is_file(text.partition(":")[0]):
            raise TrialError(
                f"{path} names a file of Python, {text}; only you may: name all probes yourself, "
                f"--probe {text} ..."
            )


def _check_families(what: str, named: Mapping[str, Any], families: set[str]) -> None:
    from patchbank.probing.probes import PROBES

    unknown = sorted(set(named) - families - set(PROBES))
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*PROBES, *families], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TrialError(f"found {what} of probe {unknown[0]!r}, which is none{hint}")
