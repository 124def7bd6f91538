"""The clip table: what a table means, and every mistake it can hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from patchbank.pipeline.audio import decode_clip
from patchbank.pipeline.errors import AudioError, ManifestError
from patchbank.pipeline.manifest import ClipTable, read_manifest
from patchbank.pipeline.specs import WindowSpec

SECOND = WindowSpec(window_s=1.0, hop_s=1.0)


def record(path: Path, seconds: float = 1.0, rate_hz: int = 8000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(seconds * rate_hz)), rate_hz)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An audio root with a 1 s, b 1 s and long 3.2 s."""
    for name, seconds in (("a.wav", 1.0), ("b.wav", 1.0), ("long.wav", 3.2)):
        record(tmp_path / "root" / name, seconds)
    return tmp_path / "root"


def table(root: Path, text: str, **settings: Any) -> ClipTable:
    (root / "clips.csv").write_bytes(text.encode())
    return read_manifest(root / "clips.csv", window=SECOND, **settings)


def column(read: ClipTable, name: str) -> list[Any]:
    cells: list[Any] = read.clips[name].to_pylist()
    return cells


def complaints(root: Path, text: str) -> list[str]:
    """The lines of the error, each from the table's file name on."""
    with pytest.raises(ManifestError) as caught:
        table(root, text)
    return [line.removeprefix(f"{root}/") for line in str(caught.value).splitlines()]


# What a table means


def test_a_bare_path_column_is_enough(root: Path) -> None:
    read = table(root, "path\nb.wav\na.wav\n")
    assert read.clips.schema == pa.schema(
        {
            "clip_id": pa.string(),
            "view": pa.int16(),
            "path": pa.string(),
            "start_s": pa.float64(),
            "duration_s": pa.float64(),
        }
    )
    assert column(read, "clip_id") == column(read, "path") == ["b.wav", "a.wav"]
    assert column(read, "duration_s") == [1.0, 1.0]
    assert (len(read), read.audio_root, read.labels) == (2, root, None)
    assert read.source == str(root / "clips.csv")


def test_views_of_a_clip_share_its_name_and_keep_what_is_mixed_in(root: Path) -> None:
    read = table(root, "clip_id,path,view,mix_sources\nx,a.wav,,\ny,b.wav,0,\nx,b.wav,1,y; y\n")
    assert column(read, "clip_id") == ["x", "y", "x"]
    assert column(read, "view") == [0, 0, 1]
    assert column(read, "mix_sources") == [[], [], ["y", "y"]]


def test_user_columns_follow_in_their_order_and_stay_strings(root: Path) -> None:
    read = table(root, "zoo,fold,path,split,n,sha256\nx,1,a.wav,valid,007,ab\n")
    assert read.clips.column_names[5:] == ["split", "fold", "zoo", "n", "sha256"]
    assert read.clips.slice(0, 1).to_pylist()[0] | {"clip_id": ""} == {
        "clip_id": "",
        "view": 0,
        "path": "a.wav",
        "start_s": 0.0,
        "duration_s": 1.0,
        "split": "valid",
        "fold": "1",
        "zoo": "x",
        "n": "007",
        "sha256": "ab",
    }


CSV_DIALECTS = {
    "byte-order mark": "\ufeffpath,note\na.wav,x\n",
    "CRLF": "path,note\r\na.wav,x\r\n",
    "quoted": '"path","note"\n"a.wav","x"\n',
    "no last newline": "path,note\na.wav,x",
    "empty trailing lines": "path,note\na.wav,x\n\n,\n\r\n",
    "spaces in the header": "path, note\na.wav,x\n",
}


@pytest.mark.parametrize("text", CSV_DIALECTS.values(), ids=CSV_DIALECTS.keys())
def test_csv_dialects_read_the_same(root: Path, text: str) -> None:
    read = table(root, text)
    assert (column(read, "path"), column(read, "note")) == (["a.wav"], ["x"])


def test_a_recording_is_cut_into_windows_named_by_their_start(root: Path) -> None:
    read = table(root, "path,note\nlong.wav,x\na.wav,y\n")
    assert column(read, "clip_id") == ["long.wav@0", "long.wav@1000", "long.wav@2000", "a.wav"]
    assert column(read, "start_s") == [0.0, 1.0, 2.0, 0.0]
    assert column(read, "note") == ["x", "x", "x", "y"]


def test_a_later_window_with_half_a_hop_of_new_audio_is_kept(root: Path) -> None:
    record(root / "more.wav", 1.6)
    read = table(root, "path\nmore.wav\n")
    assert column(read, "clip_id") == ["more.wav@0", "more.wav@1000"]
    assert column(read, "duration_s") == pytest.approx([1.0, 0.6])


def test_several_rows_of_a_recording_are_named_by_their_start(root: Path) -> None:
    read = table(root, "path,start_s,duration_s\nlong.wav,0.25,0.5\nlong.wav,1.5,1\n")
    assert column(read, "clip_id") == ["long.wav@250", "long.wav@1500"]
    assert column(read, "duration_s") == [0.5, 1.0]


def test_a_given_clip_id_gets_the_start_only_when_it_stands_for_several(root: Path) -> None:
    read = table(root, "path,clip_id,start_s\nlong.wav,x,0.5\na.wav,y,\nb.wav,,\n")
    assert column(read, "clip_id") == ["x@500", "x@1500", "x@2500", "y", "b.wav"]


def test_an_empty_cell_means_the_default(root: Path) -> None:
    read = table(root, "path,start_s,duration_s,fold\nlong.wav,2.5,,\na.wav,,0.5,\n")
    assert column(read, "start_s") == [2.5, 0.0]
    assert column(read, "duration_s") == pytest.approx([0.7, 0.5])
    assert column(read, "fold") == [None, None]


def test_a_duration_past_the_end_of_the_recording_is_padding(root: Path) -> None:
    assert column(table(root, "path,duration_s\na.wav,1.2\n"), "duration_s") == [1.0]


@pytest.mark.parametrize("path", ["./sub/../a.wav", "../root/a.wav", "sub/.."])
def test_a_path_with_two_dots_is_refused_even_if_it_stays_inside(root: Path, path: str) -> None:
    assert complaints(root, f"path\n{path}\n") == [
        f"clips.csv:2:path: {path!r} holds '..'; write it from the audio root down"
    ]


def test_paths_are_tidied_and_absolute_ones_inside_the_root_made_relative(root: Path) -> None:
    record(root / "sub/c.wav")
    read = table(root, f"path\n./a.wav\nsub//c.wav\n{root}/b.wav\n")
    assert column(read, "path") == ["a.wav", "sub/c.wav", "b.wav"]


def test_the_audio_root_may_lie_elsewhere_and_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "t.csv").write_text(f"path\na.wav\n{root}/b.wav\n{tmp_path}/link/long.wav\n")
    read = read_manifest(str(tmp_path / "t.csv"), audio_root=tmp_path / "link")
    assert column(read, "path") == ["a.wav", "b.wav", "long.wav"]


def test_a_link_that_stays_inside_the_root_is_followed(root: Path) -> None:
    (root / "link.wav").symlink_to(root / "a.wav")
    assert column(table(root, "path\nlink.wav\n"), "path") == ["link.wav"]


@pytest.mark.parametrize("name", ["corrupt.wav", "empty.wav", "corrupt.mp3", "silent.wav"])
def test_a_broken_recording_is_one_clip_that_fails_when_it_is_decoded(
    root: Path, name: str
) -> None:
    record(root / "silent.wav", 0.0)
    (root / "corrupt.wav").write_text("no audio")
    (root / "corrupt.mp3").write_text("no audio")
    (root / "empty.wav").touch()
    read = table(root, f"path\n{name}\na.wav\n")
    assert column(read, "clip_id") == [name, "a.wav"]
    assert column(read, "duration_s") == [0.0, 1.0]
    with pytest.raises(AudioError):
        decode_clip(root / name, start_s=0, duration_s=0, window=SECOND, sample_rate_hz=8000)


def test_headers_are_read_only_where_the_duration_is_unknown(root: Path) -> None:
    (root / "corrupt.wav").write_text("no audio")
    read = table(root, "path,duration_s\ncorrupt.wav,3\n")
    assert column(read, "duration_s") == [1.0, 1.0, 1.0]


# Parquet


def parquet(root: Path, columns: Mapping[str, Any]) -> ClipTable:
    pq.write_table(pa.table(dict(columns)), root / "clips.parquet")
    return read_manifest(root / "clips.parquet", window=SECOND)


def test_parquet_keeps_the_types_of_user_columns(root: Path) -> None:
    columns = {
        "path": ["a.wav", "long.wav"],
        "clip_id": [7, 8],
        "start_s": pa.array([None, 1], pa.int64()),
        "duration_s": [None, 2.0],
        "fold": [1.0, None],
        "tags": [["x"], []],
    }
    read = parquet(root, columns)
    assert column(read, "clip_id") == ["7", "8@1000", "8@2000"]
    assert column(read, "fold") == ["1", None, None]
    assert column(read, "tags") == [["x"], [], []]
    assert read.clips.schema.field("tags").type == pa.list_(pa.string())


def test_parquet_mistakes_are_found_by_row(root: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        parquet(root, {"path": ["a.wav", "a.wav", None], "duration_s": [1.0, 1.0, float("nan")]})
    assert [line.removeprefix(f"{root}/") for line in str(caught.value).splitlines()] == [
        "clips.parquet:2:path: clip_id 'a.wav@0' is taken by row 1; "
        "give each row its own start_s, clip_id or view",
        "clips.parquet:3:path: found an empty cell, expected the path of an audio file",
        "clips.parquet:3:duration_s: found 'nan', expected a number of seconds",
    ]


# Mistakes

KNOWN = (
    "known types: .wav .flac .ogg .oga .mp3 .aif .aiff .opus .aifc .au .caf .rf64 .snd .w64 .m4a"
)
MISTAKES = {
    "no file": ("path\ngone.wav\n", "2:path: 'gone.wav': there is no such file under the audio"),
    "no folder": ("path\nx/a.wav\n", "2:path: 'x/a.wav': there is no such file under the audio"),
    "file as folder": ("path\na.wav/a.wav\n", "2:path: 'a.wav/a.wav': there is no such file"),
    "a folder": ("path\nd.wav\n", "2:path: 'd.wav': found something else, expected a file"),
    "empty path": ("path,n\n,1\n", "2:path: found an empty cell, expected the path of an audio"),
    "text": ("path\na.txt\n", f"2:path: 'a.txt' has the unknown type '.txt'; {KNOWN}"),
    "mid": ("path\na.mid\n", f"2:path: 'a.mid' has the unknown type '.mid'; {KNOWN}"),
    "no type": ("path\na\n", f"2:path: 'a' has the unknown type ''; {KNOWN}"),
    "absolute": ("path\n/etc/a.wav\n", "2:path: '/etc/a.wav' is outside the audio root; give its"),
    "backslash": (
        "path\n..\\a.wav\n",
        r"2:path: found '..\\a.wav', expected a path with '/' between its folders",
    ),
    "NUL": ("path\na\0.wav\n", r"2:path: found 'a\x00.wav', expected a path with '/'"),
    "link out": ("path\nout.wav\n", "2:path: 'out.wav': this link leaves the audio root; copy"),
    "folder link out": (
        "path\nout/c.wav\n",
        "2:path: 'out/c.wav': a link on this path leaves the audio root",
    ),
    "dangling link": ("path\nnowhere.wav\n", "2:path: 'nowhere.wav': found something else"),
    "negative start": ("path,start_s\na.wav,-1\n", "2:start_s: found -1, expected 0 or more"),
    "start at the end": (
        "path,start_s\na.wav,1\n",
        "2:start_s: found 1, but 'a.wav' ends at 1.000 s",
    ),
    "no number": ("path,start_s\na.wav,x\n", "2:start_s: found 'x', expected a number of seconds"),
    "comma": ('path,start_s\na.wav,"1,5"\n', "2:start_s: found '1,5', expected a number of sec"),
    "underscore": ("path,start_s\na.wav,1_0\n", "2:start_s: found '1_0', expected a number of"),
    "nan": ("path,start_s\na.wav,nan\n", "2:start_s: found 'nan', expected a number of seconds"),
    "inf": ("path,duration_s\na.wav,inf\n", "2:duration_s: found 'inf', expected a number of"),
    "no duration": ("path,duration_s\na.wav,0\n", "2:duration_s: found 0, expected more than 0"),
    "val": (
        "path,split\na.wav,val\n",
        "2:split: found 'val', expected 'train', 'valid' or 'test'; write 'valid'",
    ),
    "validation": ("path,split\na.wav,validation\n", "2:split: found 'validation', expected"),
    "dev": ("path,split\na.wav,dev\n", "2:split: found 'dev', expected 'train', 'valid' or"),
    "eval": (
        "path,split\na.wav,eval\n",
        "2:split: found 'eval', expected 'train', 'valid' or 'test'; write 'test'",
    ),
    "capital": (
        "path,split\na.wav,Train\n",
        "2:split: found 'Train', expected 'train', 'valid' or 'test'; write 'train'",
    ),
    "other split": (
        "path,split\na.wav,x\n",
        "2:split: found 'x', expected 'train', 'valid' or 'test'",
    ),
    "no split": ("path,split\na.wav,\n", "2:split: found an empty cell, expected 'train', 'val"),
    "same path twice": (
        "path\na.wav\nb.wav\na.wav\n",
        "4:path: clip_id 'a.wav@0' is taken by line 2; give each row its own start_s, clip_id or",
    ),
    "same clip_id twice": (
        "clip_id,path\nx,a.wav\nx,b.wav\n",
        "3:clip_id: clip_id 'x' is taken by line 2; give each row its own",
    ),
    "given clip_id of a path": (
        "clip_id,path\na.wav,b.wav\n,a.wav\n",
        "3:path: clip_id 'a.wav' is taken by line 2; give each row its own",
    ),
    "ragged": ("path,n\na.wav,1,2\n", "2: found 3 cells, expected 2"),
    "short row": ("path,n\na.wav\n", "2: found 1 cells, expected 2"),
    "column twice": ("path,n,n\na.wav,1,2\n", "1: column 'n' stands twice in the header"),
    "nameless column": (",path\n0,a.wav\n", "1: column 1 has no name; name it or remove it (pan"),
    "open quote": ('path\n"a.wav\nb.wav\n', "2: cannot be read as CSV: unexpected end of data"),
    "no rows": ("path\n", " the table has no rows; expected one row a recording or segment"),
    "nothing": ("", " the file is empty; expected a header line with a column 'path'"),
    "misspelt": (
        "paths,Start,id\na.wav,0,x\n",
        "1: no column 'path'; found 'paths', 'Start', 'id'; "
        "rename 'paths' to 'path', 'Start' to 'start_s', 'id' to 'clip_id'",
    ),
    "filename": (
        "filename,n\na.wav,0\n",
        "1: no column 'path'; found 'filename', 'n'; rename 'filename' to 'path'",
    ),
    "no likeness": ("x,y\na.wav,0\n", "1: no column 'path'; found 'x', 'y'"),
    "semicolons": (
        "path;n\na.wav;0\n",
        "1: no column 'path'; found 'path;n'; expected ',' between columns, not ';'",
    ),
    **{
        name: (
            f"path,{name}\na.wav,x\n",
            f"1:{name}: a bank writes a column of that name itself; rename yours",
        )
        for name in ("status", "reason", "audio_sha256", "sha256_12", "crc32c_12.patches")
    },
    "no view": (
        "path,view\na.wav,x\n",
        "2:view: found 'x', expected 0 for the clean clip, or the number of a view",
    ),
    "half a view": ("path,view\na.wav,0.5\n", "2:view: found '0.5', expected 0 for the clean"),
    "view of nothing": (
        "clip_id,path,view\nx,a.wav,1\n",
        "2:view: view 1 of 'x', which has no view 0",
    ),
    "the same view twice": (
        "clip_id,path,view\nx,a.wav,0\nx,b.wav,1\nx,b.wav,1\n",
        "4:clip_id: clip_id 'x' is taken by line 3; give each row its own",
    ),
    "a view in another split": (
        "clip_id,path,view,split\nx,a.wav,0,test\nx,b.wav,1,train\n",
        "3:split: 'x' has split 'train', 'x', whose sound it holds, has 'test'",
    ),
    "a mix from another fold": (
        "clip_id,path,view,fold,mix_sources\nx,a.wav,0,1,\ny,b.wav,0,2,\nx,b.wav,1,1,y\n",
        "4:fold: 'x' has fold '1', 'y', whose sound it holds, has '2'",
    ),
    "a mix of nothing": (
        "clip_id,path,view,mix_sources\nx,a.wav,0,\nx,b.wav,1,z\n",
        "3:mix_sources: no clip 'z' with view 0 in this table",
    ),
    "a mixed original": (
        "clip_id,path,mix_sources\nx,a.wav,\ny,b.wav,x\n",
        "3:mix_sources: 'y' is a mix, expected a view above 0",
    ),
    "n_patches": ("path,n_patches\na.wav,x\n", "1:n_patches: a bank writes a column of that"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_reported_with_its_place(
    root: Path, tmp_path: Path, text: str, message: str
) -> None:
    (root / "d.wav").mkdir()
    (root / "out.wav").symlink_to(record(tmp_path / "elsewhere/c.wav"))
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "nowhere.wav").symlink_to(root / "gone.wav")
    (only,) = complaints(root, text)
    assert only.startswith(f"clips.csv:{message}")


def test_all_mistakes_are_reported_at_once_in_the_order_of_their_lines(root: Path) -> None:
    text = 'path,start_s,split,note\na.wav,9,dev,"two\nlines"\n\ngone.wav,x,,\nb.wav,0,test,\n'
    assert [line.split(" ")[0] for line in complaints(root, text)] == [
        "clips.csv:2:start_s:",
        "clips.csv:2:split:",
        "clips.csv:5:path:",
        "clips.csv:5:start_s:",
        "clips.csv:5:split:",
    ]


def test_twenty_mistakes_are_shown_and_the_others_counted(root: Path) -> None:
    lines = complaints(root, "path\n" + "gone.wav\n" * 23)
    assert (len(lines), lines[-1]) == (21, "... and 3 more")


def test_text_that_is_not_utf8_is_refused_with_its_line(root: Path) -> None:
    (root / "clips.csv").write_bytes("path,note\na.wav,x\nb.wav,é\n".encode("latin-1"))
    with pytest.raises(ManifestError, match=r"clips\.csv:3: is not UTF-8 text; save the table"):
        read_manifest(root / "clips.csv")


SOURCES = {
    "no such file": ("gone.csv", r"gone\.csv: nothing is there; expected a \.csv or \.parquet"),
    "other type": ("clips.xlsx", r"clips\.xlsx: found type '\.xlsx', expected \.csv or \.parquet"),
    "no type": ("clips", r"clips: found type '', expected \.csv or \.parquet"),
    "no Parquet": ("clips.parquet", r"clips\.parquet: cannot be read as Parquet: "),
}


@pytest.mark.parametrize(("name", "message"), SOURCES.values(), ids=SOURCES.keys())
def test_a_source_that_is_no_table_is_refused(tmp_path: Path, name: str, message: str) -> None:
    if name != "gone.csv":
        (tmp_path / name).write_text("nothing of use")
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / name)


def test_an_audio_root_that_is_no_folder_is_refused(root: Path) -> None:
    with pytest.raises(ManifestError, match=r"gone: the audio root is no folder; correct --audio"):
        table(root, "path\na.wav\n", audio_root=root / "gone")


def test_a_real_table_gives_one_clip_a_row(shared: Path) -> None:
    read = read_manifest(shared / "sample/manifest.csv")
    assert (len(read), read.clips.column_names[5:8]) == (598, ["split", "fold", "labels"])
