from __future__ import annotations

import pytest

from patchbank.pipeline.errors import TrialError
from patchbank.probing.entries import Entry, on_layers, parse_layers, parse_probe


def test_a_probe_is_a_name_with_options_or_a_file() -> None:
    assert parse_probe("linear") == Entry("linear", "linear")
    text = "protobin:dropout=0.1,n_prototypes_per_class=10"
    options = {"dropout": 0.1, "n_prototypes_per_class": 10}
    assert parse_probe(text) == Entry(text.replace(":", "-"), "protobin", options)
    assert parse_probe("linpre:pooling=lse,x=null").options == {"pooling": "lse", "x": None}
    assert parse_probe("mine.py:path=a/b").name == "mine-path=a_b"
    mine = parse_probe("./probes/mine.py:width=3")
    assert mine == Entry("mine-width=3", "./probes/mine.py", {"width": 3})
    assert mine.family_name == "mine"


@pytest.mark.parametrize("text", ["linpre:lse", "linpre:=3"])
def test_an_option_without_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(TrialError, match=r"found option '.*' in 'linpre:.*', expected NAME=VALUE"):
        parse_probe(text)


LAYERS = {
    "nothing": ([], [(12,)]),
    "last": (["last"], [(12,)]),
    "all": (["all"], [(3,), (6,), (12,)]),
    "mix": (["mix"], [(3, 6, 12)]),
    "some mixed": (["3+12", "6"], [(3, 12), (6,)]),
    "commas": (["3,6", "3"], [(3,), (6,)]),
    "twice in a mix": (["3+3"], [(3,)]),
    "one mix in two orders": (["3+6", "6+3,"], [(3, 6)]),
}


@pytest.mark.parametrize(("texts", "chosen"), LAYERS.values(), ids=LAYERS)
def test_layers_are_chosen_one_by_one_or_mixed(
    texts: list[str], chosen: list[tuple[int, ...]]
) -> None:
    assert parse_layers(texts, (12, 3, 6)) == chosen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "found no layer 4 in the bank, expected one of 3, 6"),
        ("3+4", "found no layer 4 in the bank"),
        ("lst", r"found layer 'lst', expected last, all, mix, a number .*; did you mean 'last'\?"),
        ("-1", "found layer '-1', expected last, all"),
        ("3+", r"found layer '3\+', expected last"),
    ],
)
def test_layers_that_there_are_not_are_named(text: str, message: str) -> None:
    with pytest.raises(TrialError, match=message):
        parse_layers([text], (3, 6))


def test_entries_are_named_after_their_layers_where_there_are_several_choices() -> None:
    entries = [parse_probe("linear"), parse_probe("mhca")]
    assert [one.name for one in on_layers(entries, [(3,)])] == ["linear", "mhca"]
    placed = on_layers(entries, [(3,), (3, 6)])
    assert [one.name for one in placed] == ["linear@3", "linear@3+6", "mhca@3", "mhca@3+6"]
    assert placed[1].layers == (3, 6)
    own = Entry("mine", "linear", {}, (6,))
    assert on_layers([own], [(3,), (3, 6)]) == (own,)


def test_two_entries_of_one_name_are_refused() -> None:
    entries = [parse_probe("a/mine.py"), parse_probe("b/mine.py")]
    with pytest.raises(TrialError, match="found probe mine twice, expected different names"):
        on_layers(entries, [(3,)])
