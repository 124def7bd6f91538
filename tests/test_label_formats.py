"""Names that somebody else chose stay text in one row, whatever is in them."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from patchbank.cli.label_formats import WRITERS, Shown
from patchbank.cli.label_output import Format
from patchbank.cli.predictor import Prediction
from patchbank.probing.artefact import ProbeArtefact
from patchbank.probing.plain_text import printable
from patchbank.probing.probes.base import ProbeShape

CLASSES = ("cat\n0.0-9.0 s  dog 1.00", 'o"wl,\r\x1b[2J')
CLIP = "a\nb\r\x1b]0;title\x07.wav"


def written(format_: Format) -> str:
    artefact = ProbeArtefact("linear", {}, CLASSES, True, ProbeShape(4, 2), {})
    out = io.StringIO(newline="")
    writer = WRITERS[format_](out, Shown(artefact))
    writer.row(Prediction(CLIP, 0.0, 1.0, np.array([0.75, 0.25], dtype=np.float32)))
    writer.end()
    return out.getvalue()


def test_a_line_of_text_is_one_line_that_moves_no_terminal() -> None:
    assert written("text") == (
        "a\\nb\\r\\x1b]0;title\\x07.wav  0.0-1.0 s  "
        'cat\\n0.0-9.0 s  dog 1.00 0.75  o"wl,\\r\\x1b[2J 0.25\n'
    )


def test_names_with_line_breaks_are_one_record_of_a_csv_and_come_back() -> None:
    rows = list(csv.reader(io.StringIO(written("csv"), newline="")))
    assert rows == [
        ["clip", "start_s", "end_s", *CLASSES],
        [CLIP, "0.0", "1.0", "0.750000", "0.250000"],
    ]


def test_json_and_label_tracks_have_one_line_a_row() -> None:
    [line] = written("json").splitlines()
    assert json.loads(line)["clip"] == CLIP
    assert set(json.loads(line)["labels"]) == set(CLASSES)
    assert written("audacity").splitlines() == [
        "0.000000\t1.000000\tcat 0.0-9.0 s dog 1.00",
        '0.000000\t1.000000\to"wl, \\x1b[2J',
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Höhle 熊 🐻", "Höhle 熊 🐻"),
        ("a\u202eb\u2028c\x85", "a\\u202eb\\u2028c\\x85"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_letters_are_kept_and_other_characters_named(text: str, shown: str) -> None:
    assert printable(text) == shown
