"""The clip table: which stretches of which recordings a bank is made of.

It comes from a CSV or Parquet file, a folder of class folders, or a data set in containers. All
its mistakes are reported at once, before any clip is decoded. A file that is there but broken is no
mistake of the table: it stays as one clip without audio and fails, with its reason, when it is
decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from patchbank.pipeline.errors import ManifestError, Problem
from patchbank.pipeline.manifest.audio_files import decoder_trouble, file_troubles
from patchbank.pipeline.manifest.columns import header_problems, kept_columns
from patchbank.pipeline.manifest.data_set import is_data_set_file, read_data_set
from patchbank.pipeline.manifest.durations import recording_durations_s
from patchbank.pipeline.manifest.folder import read_folder
from patchbank.pipeline.manifest.found_audio import FoundAudio
from patchbank.pipeline.manifest.rows import CheckedRows, check_rows
from patchbank.pipeline.manifest.sheet import Sheet, read_sheet
from patchbank.pipeline.manifest.views import view_problems
from patchbank.pipeline.manifest.windows import Cuts, Segments, cut
from patchbank.pipeline.specs import WindowSpec

Progress = Callable[[int, int], None]
"""Takes how many recordings' headers have been read, and of how many."""


@dataclass(frozen=True)
class ClipTable:
    """The clips of a bank, in order; each has a `clip_id` of its own."""

    clips: pa.Table
    """`clip_id, view, path, start_s, duration_s`, `split`, `fold` and `mix_sources` if given, then
    user columns.

    `path` is POSIX and relative to the audio root; `duration_s` is how much of the window is
    audio, 0 where the recording cannot be read. A clip may come in several variants, told apart by
    `view`: 0 is the clean one.
    """
    audio_root: Path
    labels: pa.Table | None
    """`clip_id, labels`, where class folders or a data set tell them."""
    source: str
    """The table or folder as it was given."""

    def __len__(self) -> int:
        return int(self.clips.num_rows)


def read_manifest(
    source: Path | str,
    *,
    audio_root: Path | None = None,
    window: WindowSpec = WindowSpec(),  # noqa: B008 - frozen
    progress: Progress | None = None,
) -> ClipTable:
    """The clips that a table, a folder of audio or a data set gives under `window`.

    `audio_root` is the table's folder, or the folder itself, unless given. The headers of
    recordings without a `duration_s` are read. Raises `ManifestError` with every mistake.
    """
    place = Path(source)
    if not place.exists():
        raise _error(
            place, "nothing is there; expected a .csv or .parquet table, a .tar, or a folder"
        )
    root = audio_root or (place if place.is_dir() else place.parent)
    if not root.is_dir():
        raise _error(root, "the audio root is no folder; correct --audio-root")
    if place.is_dir():
        return _clips_of_found(place, read_folder(place), root, window, progress)
    if is_data_set_file(place) or place.suffix.lower() == ".arrow":
        found = read_data_set(place.parent, [place.name])
        clips = _clips_of_found(place.parent, found, root, window, progress)
        return replace(clips, source=str(place))
    return _clips_of_sheet(place, root, window, progress)


def _error(file: Path, message: str) -> ManifestError:
    return ManifestError([Problem(str(file), None, None, message)])


def _clips_of_sheet(
    place: Path, audio_root: Path, window: WindowSpec, progress: Progress | None
) -> ClipTable:
    sheet = read_sheet(place)
    problems = header_problems(sheet)
    if "path" not in sheet.cells.column_names:
        raise ManifestError(problems)
    rows = check_rows(sheet, audio_root=audio_root, progress=progress)
    cuts = cut(rows.segments, window)
    problems += [*rows.problems, *_duplicates(sheet, rows, cuts)]
    if not problems:
        clips = _clip_table(rows.segments, cuts, kept_columns(sheet))
        problems = view_problems(sheet, clips, [rows.lines[segment] for segment in cuts.segments])
    if problems:
        raise ManifestError(sorted(problems, key=lambda problem: problem.line or 0))
    return ClipTable(clips, audio_root, None, str(place))


def _duplicates(sheet: Sheet, rows: CheckedRows, cuts: Cuts) -> list[Problem]:
    first_lines: dict[tuple[str, int], int] = {}
    problems = []
    views = rows.segments.views or [0] * len(rows.lines)
    for segment, clip_id in zip(cuts.segments, cuts.clip_ids, strict=True):
        line = rows.lines[segment]
        first_line = first_lines.setdefault((clip_id, views[segment]), line)
        if first_line != line:
            column = "path" if rows.segments.clip_ids[segment] is None else "clip_id"
            message = (
                f"clip_id {clip_id!r} is taken by {sheet.line_word} {first_line}; "
                "give each row its own start_s, clip_id or view"
            )
            problems.append(Problem(sheet.file, line, column, message))
    return problems


def _clip_table(segments: Segments, cuts: Cuts, kept: Mapping[str, Any]) -> pa.Table:
    """The clips with what their rows say about them."""
    paths = pa.array(segments.paths, pa.string())
    owners = pa.array(cuts.segments, pa.int64())
    views = segments.views or [0] * len(segments.paths)
    columns = {
        "clip_id": pa.array(cuts.clip_ids, pa.string()),
        "view": pa.array(views, pa.int16()).take(owners),
        "path": paths.take(owners),
        "start_s": pa.array(cuts.starts_s, pa.float64()),
        "duration_s": pa.array(cuts.durations_s, pa.float64()),
    }
    return pa.table(columns | {name: cells.take(owners) for name, cells in kept.items()})


def _clips_of_found(
    folder: Path,
    found: FoundAudio,
    audio_root: Path,
    window: WindowSpec,
    progress: Progress | None,
) -> ClipTable:
    paths = _paths_below(audio_root, folder, found)
    recordings_s = recording_durations_s(paths, audio_root=audio_root, progress=progress)
    durations_s = [recordings_s[path] or 0.0 for path in paths]
    segments = Segments(paths, [None] * len(paths), [0.0] * len(paths), durations_s)
    cuts = cut(segments, window)
    clips = _clip_table(segments, cuts, found.columns)
    return ClipTable(clips, audio_root, _label_table(found, clips, cuts), str(folder))


def _paths_below(audio_root: Path, folder: Path, found: FoundAudio) -> Sequence[str]:
    try:
        place = folder.resolve().relative_to(audio_root.resolve())
    except ValueError as error:
        raise _error(folder, f"is outside the audio root {audio_root}") from error
    paths = [(place / path).as_posix() for path in found.paths]
    if trouble := decoder_trouble(paths):
        raise _error(folder, trouble)
    if troubles := file_troubles(paths, audio_root=audio_root):
        places = [(str(audio_root / path), trouble) for path, trouble in sorted(troubles.items())]
        raise ManifestError([Problem(file, None, None, trouble) for file, trouble in places])
    return paths


def _label_table(found: FoundAudio, clips: pa.Table, cuts: Cuts) -> pa.Table | None:
    """The labels of clips of which any are known; a clip without is left out."""
    if found.labels is None:
        return None
    cells = pa.array([found.labels[segment] for segment in cuts.segments], pa.string())
    return pa.table({"clip_id": clips["clip_id"], "labels": cells}).filter(cells.is_valid())
