from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from needle_sets import clip_table

from patchbank.pipeline.errors import ManifestError
from patchbank.probing.labels import LabelSet, read_labels
from patchbank.probing.vocabulary import read_vocabulary


def write(folder: Path, text: str) -> Path:
    path = folder / "LABELS.csv"
    path.write_text(text)
    return path


def found(labels: LabelSet) -> list[set[str]]:
    """The class names of each row."""
    return [
        {name for name, on in zip(labels.classes, row, strict=True) if on} for row in labels.targets
    ]


def test_labels_by_clip_id_are_split_trimmed_and_sorted(tmp_path: Path) -> None:
    path = write(tmp_path, "clip_id,labels\nr0/0, dog ;cat\nr0/1,\nr1/0,cat; ;\n")
    labels = read_labels(path, clip_table(3))
    assert labels.classes == ("cat", "dog")
    assert found(labels) == [{"cat", "dog"}, set(), {"cat"}]
    assert labels.known.all()
    assert labels.multi_label
    assert labels.targets.dtype == np.float32


def test_labels_by_path_reach_every_clip_of_the_recording(tmp_path: Path) -> None:
    path = write(tmp_path, "path,labels\nr0.wav,dog\nr1.wav,cat\n")
    labels = read_labels(path, clip_table(4))
    assert found(labels) == [{"dog"}, {"dog"}, {"cat"}, {"cat"}]
    assert not labels.multi_label


def test_labels_reach_every_view_of_a_clip(tmp_path: Path) -> None:
    clips = clip_table(2, clip_id=["a", "a"], view=[0, 1])
    labels = read_labels(write(tmp_path, "clip_id,labels\na,dog;cat\n"), clips)
    assert found(labels) == [{"cat", "dog"}] * 2


def test_a_clip_gets_the_labels_of_all_events_that_overlap_it(tmp_path: Path) -> None:
    events = "r0.wav,9.5,10.0,before\nr0.wav,9.5,10.5,across\nr0.wav,10,10,instant\n"
    rest = "r0.wav,19,20,late\nr0.wav,20,30,beyond\nr1.wav,,,\n"
    path = write(tmp_path, "path,start_s,end_s,labels\n" + events + rest)
    labels = read_labels(path, clip_table(3))
    assert found(labels) == [{"across", "before"}, {"across", "instant", "late"}, set()]
    assert labels.known.all()


def test_a_vocabulary_fixes_the_order_and_keeps_classes_without_clips(tmp_path: Path) -> None:
    path = write(tmp_path, "clip_id,labels\nr0/0,dog\n")
    labels = read_labels(path, clip_table(1), classes=["owl", "dog", "cat"])
    assert labels.classes == ("owl", "dog", "cat")
    assert labels.targets.tolist() == [[0, 1, 0]]


def test_a_task_is_multilabel_on_request(tmp_path: Path) -> None:
    path = write(tmp_path, "clip_id,labels\nr0/0,dog\nr0/1,cat\n")
    assert not read_labels(path, clip_table(2)).multi_label
    assert read_labels(path, clip_table(2), task="multilabel").multi_label


def test_failed_clips_need_no_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "clip_id,labels\nr0/0,dog\nr1/0,cat\n")
    labels = read_labels(path, clip_table(3, status=[1, 2, 1]))
    assert labels.known.tolist() == [True, False, True]


def test_unlabelled_clips_are_left_out_and_counted_on_request(tmp_path: Path) -> None:
    path = write(tmp_path, "clip_id,labels\nr0/0,dog\nr1/0,cat\n")
    labels = read_labels(path, clip_table(3), allow_unlabelled=True)
    assert labels.known.tolist() == [True, False, True]
    assert labels.n_unlabelled == 1


def test_parquet_labels_may_be_lists(tmp_path: Path) -> None:
    path = tmp_path / "labels.parquet"
    table = pa.table({"clip_id": ["r0/0", "r0/1"], "labels": [["cat", "dog"], None]})
    pq.write_table(table, path)
    assert found(read_labels(path, clip_table(2))) == [{"cat", "dog"}, set()]


PROBLEMS = {
    "unknown clip": (
        "clip_id,labels\nr0/0,a\nr0/1,b\nr9/9,a\n",
        "LABELS.csv:4:clip_id: no clip of the bank has clip_id 'r9/9', expected one like 'r0/0'",
    ),
    "unknown path": (
        "path,labels\nr0.wav,a\nx.wav,b\n",
        "LABELS.csv:3:path: no clip of the bank has path 'x.wav', expected one like 'r0.wav'",
    ),
    "unlabelled clip": (
        "clip_id,labels\nr0/0,a\n",
        "LABELS.csv: clip 'r0/1' has no labels, expected a row (or pass --allow-unlabelled)",
    ),
    "conflict": (
        "clip_id,labels\nr0/0,a\nr0/1,b\nr0/0,a;b\n",
        "LABELS.csv:4:labels: 'r0/0' has other labels on line 2, expected one set a clip_id",
    ),
    "no labels column": (
        "clip_id,label\nr0/0,a\n",
        "LABELS.csv:1:labels: no such column (class names with ';' between them); "
        "found columns clip_id, label; rename 'label'?",
    ),
    "no key": (
        "clipid,labels\nr0/0,a\n",
        "LABELS.csv:1:clip_id: no such column (or path, or path,start_s,end_s: which clip); "
        "found columns clipid, labels; rename 'clipid'?",
    ),
    "events without an end": (
        "path,start_s,duration_s,labels\nr0.wav,1,2,a\n",
        "LABELS.csv:1:end_s: no such column (events are path,start_s,end_s); "
        "found columns path, start_s, duration_s, labels",
    ),
    "bad number": (
        "path,start_s,end_s,labels\nr0.wav,one,2,a\n",
        "LABELS.csv:2:start_s: found 'one', expected a number of seconds",
    ),
    "event that ends before it starts": (
        "path,start_s,end_s,labels\nr0.wav,3,2,a\n",
        "LABELS.csv:2:end_s: found 2.0 s, expected no less than start_s=3.0",
    ),
    "ragged line": (
        "clip_id,labels\nr0/0,a\nr0/1,a,b\n",
        "LABELS.csv:3: found 3 cells, expected 2",
    ),
    "column twice": (
        "clip_id,labels,labels\nr0/0,a,a\n",
        "LABELS.csv:1:labels: found this column twice, expected it once",
    ),
    "no rows": ("clip_id,labels\n", "LABELS.csv: found no rows, expected some"),
    "no classes": (
        "clip_id,labels\nr0/0,\nr0/1,\n",
        "LABELS.csv:labels: every cell is empty, expected class names",
    ),
    "reserved name": (
        "clip_id,labels\nr0/0,clip_id\nr0/1,b\n",
        "LABELS.csv:labels: found a class named 'clip_id', which names a column of the predictions",
    ),
}


@pytest.mark.parametrize(("text", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_wrong_table_says_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_labels(write(tmp_path, text), clip_table(2))
    assert message in str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "clip_id,labels\nr9/9,a\nr0/0,b\nr0/0,a\n")
    with pytest.raises(ManifestError) as caught:
        read_labels(path, clip_table(2))
    assert [problem.line for problem in caught.value.problems] == [2, 4, None]


def test_a_class_outside_the_vocabulary_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    path = write(tmp_path, "clip_id,labels\nr0/0,Dgo\n")
    with pytest.raises(ManifestError) as caught:
        read_labels(path, clip_table(1), classes=["Dog", "Cat"])
    message = "found class 'Dgo', expected one of the 2 given; did you mean 'Dog'?"
    assert str(caught.value).endswith(message)


MULTICLASS = {
    "two": ("r0/0,a\nr0/1,a;b\n", "clip 'r0/1' has 2 labels (a;b), expected one"),
    "none": ("r0/0,a\nr0/1,\n", "clip 'r0/1' has no label, expected one"),
}


@pytest.mark.parametrize(("rows", "message"), MULTICLASS.values(), ids=MULTICLASS)
def test_a_multiclass_task_needs_one_label_a_clip(tmp_path: Path, rows: str, message: str) -> None:
    path = write(tmp_path, "clip_id,labels\n" + rows)
    with pytest.raises(ManifestError) as caught:
        read_labels(path, clip_table(2), classes=["a", "b"], task="multiclass")
    assert str(caught.value) == f"{path}:3:labels: {message} (or pass --task multilabel)"


def test_a_multiclass_task_needs_two_classes(tmp_path: Path) -> None:
    path = write(tmp_path, "clip_id,labels\nr0/0,a\n")
    with pytest.raises(ManifestError, match="found 1 class \\(a\\), expected at least 2"):
        read_labels(path, clip_table(1))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"nowhere\.csv: there is no such file"):
        read_labels(tmp_path / "nowhere.csv", clip_table(1))


def test_bytes_that_are_no_table_are_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.parquet"
    path.write_bytes(b"\xff\xfenonsense")
    with pytest.raises(ManifestError, match=r"labels\.parquet: expected Parquet, found: "):
        read_labels(path, clip_table(1))
    (tmp_path / "labels.csv").write_bytes(b"clip_id\xff\n")
    with pytest.raises(ManifestError, match=r"labels\.csv: expected CSV in UTF-8, found: "):
        read_labels(tmp_path / "labels.csv", clip_table(1))


VOCABULARIES = {
    "name column": ("v.csv", "index,name\n0,dog\n1,cat\n"),
    "display_name column": ("v.csv", 'index,mid,display_name\n0,/m/1,dog\n1,/m/2,"cat"\n'),
    "text": ("v.txt", "dog\n\n cat \n"),
}


@pytest.mark.parametrize(("name", "text"), VOCABULARIES.values(), ids=VOCABULARIES)
def test_a_vocabulary_is_read_in_its_order(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_vocabulary(tmp_path / name) == ("dog", "cat")


WRONG_VOCABULARIES = {
    "twice": ("v.txt", "dog\ncat\ndog\n", "3: found class 'dog' again, expected it once (line 1)"),
    "no column": ("v.csv", "a,b\n1,2\n", "1: found columns a, b, expected a column 'name' or"),
    "empty name": ("v.csv", "i,name\n1,\n", "2: found an empty class name"),
    "empty file": ("v.txt", "\n", " found no class names, expected some"),
}


@pytest.mark.parametrize(
    ("name", "text", "message"), WRONG_VOCABULARIES.values(), ids=WRONG_VOCABULARIES
)
def test_a_wrong_vocabulary_says_where_and_what(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError) as caught:
        read_vocabulary(tmp_path / name)
    assert f"{name}:{message}" in str(caught.value)


def test_a_missing_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="there is no such file"):
        read_vocabulary(tmp_path / "v.txt")


def test_a_view_has_the_labels_of_all_that_is_mixed_into_it(tmp_path: Path) -> None:
    clips = clip_table(
        5,
        clip_id=["a", "b", "c", "a", "b"],
        view=[0, 0, 0, 1, 1],
        mix_sources=[[], [], [], ["c", "b"], []],
    )
    path = write(tmp_path, "clip_id,labels\na,dog\nb,\nc,cat;owl\n")
    labels = read_labels(path, clips)
    assert found(labels) == [{"dog"}, set(), {"cat", "owl"}, {"dog", "cat", "owl"}, set()]
    assert labels.known.all()


def test_a_mix_with_an_unlabelled_clip_is_unlabelled(tmp_path: Path) -> None:
    clips = clip_table(3, clip_id=["a", "b", "a"], view=[0, 0, 1], mix_sources=[[], [], ["b"]])
    path = write(tmp_path, "clip_id,labels\na,dog;cat\n")
    labels = read_labels(path, clips, allow_unlabelled=True)
    assert labels.known.tolist() == [True, False, False]
    assert labels.n_unlabelled == 2


def test_a_view_whose_sound_is_not_all_in_the_bank_has_no_known_labels(tmp_path: Path) -> None:
    clips = clip_table(2, clip_id=["a", "a"], view=[0, 1], mix_sources=[[], ["gone"]])
    path = write(tmp_path, "clip_id,labels\na,dog;cat\n")
    with pytest.raises(ManifestError, match="view 1 of 'a' holds the sound of 'gone'"):
        read_labels(path, clips)
    labels = read_labels(path, clips, allow_unlabelled=True)
    assert labels.known.tolist() == [True, False]


def mixed_clips() -> pa.Table:
    """Three clips and two views, of which the second holds all three."""
    return clip_table(
        5,
        clip_id=["a", "b", "c", "a", "a"],
        view=[0, 0, 0, 1, 2],
        mix_sources=[[], [], [], [], ["b", "c"]],
    )


@pytest.mark.parametrize("task", ["auto", "multiclass"])
def test_mixes_of_several_classes_leave_a_task_multiclass(
    task: Literal["auto", "multiclass"], tmp_path: Path
) -> None:
    path = write(tmp_path, "clip_id,labels\na,cat\nb,dog\nc,dog\n")
    labels = read_labels(path, mixed_clips(), task=task)
    assert not labels.multi_label
    assert labels.targets.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0], [0.5, 0.5]]
    assert labels.targets.dtype == np.float32
    wide = read_labels(path, mixed_clips(), task="multilabel")
    assert wide.targets.tolist()[4] == [1, 1]


def test_clean_clips_with_several_labels_make_a_task_multilabel(tmp_path: Path) -> None:
    path = write(tmp_path, "clip_id,labels\na,cat;owl\nb,dog\nc,dog\n")
    labels = read_labels(path, mixed_clips())
    assert labels.multi_label
    assert labels.targets.tolist()[4] == [1, 1, 1]
    with pytest.raises(ManifestError, match=r": clip 'a' has 2 labels \(cat;owl\), expected one"):
        read_labels(path, mixed_clips(), task="multiclass")


def test_a_view_without_any_label_is_named_with_its_number(tmp_path: Path) -> None:
    clips = clip_table(3, clip_id=["a", "b", "a"], view=[0, 0, 3], status=[2, 1, 1])
    path = write(tmp_path, "clip_id,labels\na,\nb,dog\n")
    with pytest.raises(ManifestError, match="view 3 of 'a' has no label, expected one"):
        read_labels(path, clips, classes=["dog", "cat"], task="multiclass")


def test_only_clean_clips_are_labelled_on_request(tmp_path: Path) -> None:
    clips = clip_table(3, clip_id=["a", "b", "a"], view=[0, 0, 1], mix_sources=[[], [], ["gone"]])
    path = write(tmp_path, "clip_id,labels\na,dog\nb,cat\n")
    labels = read_labels(path, clips, only_clean=True)
    assert labels.known.tolist() == [True, True, False]
    assert labels.n_unlabelled == 0
