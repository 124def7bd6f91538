"""Options as a person types them: of the right kind, or refused by name."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from patchbank.pipeline.errors import TrialError
from patchbank.probing.entries import parse_probe
from patchbank.probing.probes import PROBES, build_probe
from patchbank.probing.probes.base import Probe, ProbeShape
from patchbank.probing.probes.options import choice, number, switch, whole

SHAPE = ProbeShape(24, 3, 1, (4, 3))
WHOLE = "expected a whole number from 1"
RATE = "expected a number, at least 0 and below 1"


def typed(text: str) -> Probe:
    entry = parse_probe(text)
    return build_probe(entry.family, SHAPE, entry.options)


REFUSED = {
    "protobin:dropout=abc": f"found dropout='abc', {RATE}",
    "protobin:dropout=NaN": f"found dropout=nan, {RATE}",
    "protobin:n_prototypes_per_class=2.5": f"found n_prototypes_per_class=2.5, {WHOLE}",
    "protobin:classes_per_block=abc": f"found classes_per_block='abc', {WHOLE}, or null",
    "protofloat:classes_per_block=true": f"found classes_per_block=True, {WHOLE}, or null",
    "cgp:n_prototypes=many": f"found n_prototypes='many', {WHOLE}",
    "cgp:dropout=false": f"found dropout=False, {RATE}",
    "mhca:n_heads=abc": f"found n_heads='abc', {WHOLE}",
    "mhca:n_heads=3.7": f"found n_heads=3.7, {WHOLE}",
    "mhca:n_heads=true": f"found n_heads=True, {WHOLE}",
    "mhca:n_heads=0": "found n_heads=0, expected at least 1",
    "ep:n_queries=2.5": f"found n_queries=2.5, {WHOLE}",
    "ep:d_out=null": f"found d_out=None, {WHOLE}",
    "knn:k=abc": f"found k='abc', {WHOLE}",
    "knn:k=2.5": f"found k=2.5, {WHOLE}",
    "knn:temperature=NaN": "found temperature=nan, expected a number, more than 0",
    "knn:temperature=Infinity": "found temperature=inf, expected a number, more than 0",
    "knn:vector=3": "found vector=3, expected mean or cls",
    "simpool:gamma=abc": "found gamma='abc', expected a number, more than 0, or null",
    "conv:channels=null": f"found channels=None, {WHOLE}",
    "conv:kernel=3.5": f"found kernel=3.5, {WHOLE}",
    "proto:orthogonality=abc": "found orthogonality='abc', expected a number, at least 0",
    "proto:focal=no": "found focal='no', expected true or false",
    "proto:focal=1": "found focal=1, expected true or false",
    "proto:n_prototypes_per_class=1.5": f"found n_prototypes_per_class=1.5, {WHOLE}",
    "mlp:hidden=2.9": f"found hidden=2.9, {WHOLE}",
    "mlp:dropout=half": f"found dropout='half', {RATE}",
    f"mlp:hidden={'9' * 400}": "found hidden=999",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=[text[:40] for text in REFUSED])
def test_an_option_of_the_wrong_kind_is_refused(text: str, message: str) -> None:
    with pytest.raises(TrialError, match=re.escape(message)):
        typed(text)


TAKEN: dict[str, dict[str, Any]] = {
    "protobin:n_prototypes_per_class=1e1": {"n_prototypes_per_class": 10},
    "protobin:classes_per_block=null": {"classes_per_block": None},
    "cgp:n_prototypes=1e3": {"n_prototypes": 1000},
    "mhca:n_heads=8.0": {"n_heads": 8},
    "knn:temperature=1": {"temperature": 1.0},
    "proto:focal=false,orthogonality=0": {"focal": False, "orthogonality": 0.0},
    "simpool:gamma=2": {"gamma": 2.0},
    "simpool:gamma=null": {"gamma": None},
}


@pytest.mark.parametrize(("text", "expected"), TAKEN.items(), ids=TAKEN)
def test_a_number_is_taken_however_it_is_written(text: str, expected: dict[str, Any]) -> None:
    probe = typed(text)
    found = {name: probe.options[name] for name in expected}
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in expected.items()
    }


@pytest.mark.parametrize("name", PROBES)
def test_every_option_of_every_probe_refuses_a_list(name: str) -> None:
    for option in build_probe(name, SHAPE).options:
        with pytest.raises(TrialError, match=re.escape(f"found {option}=[1], expected ")):
            build_probe(name, SHAPE, {option: [1]})


def test_numbers_of_numpy_become_plain_ones() -> None:
    options = {"k": np.int64(3), "rate": np.float32(0.5), "width": np.float64(4.0)}
    assert type(whole(options, "k", 1)) is int
    assert type(whole(options, "width", 1)) is int
    assert type(number(options, "rate", 0.0)) is float


def test_readers_give_their_defaults() -> None:
    assert whole({}, "k", 3) == 3
    assert number({}, "rate", 0.5, below=1) == 0.5
    assert switch({}, "focal", True) is True
    assert choice({}, "vector", ("mean", "cls"), "cls") == "cls"
