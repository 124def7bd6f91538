"""The rows of a clip table, checked cell by cell and turned into segments of recordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from patchbank.pipeline.errors import Problem
from patchbank.pipeline.manifest.audio_files import (
    UnusablePathError,
    decoder_trouble,
    file_troubles,
    relative_path,
    root_names,
)
from patchbank.pipeline.manifest.columns import (
    second_cells,
    split_problems,
    text_cells,
    view_cells,
)
from patchbank.pipeline.manifest.durations import recording_durations_s
from patchbank.pipeline.manifest.sheet import Sheet
from patchbank.pipeline.manifest.windows import Segments


@dataclass(frozen=True)
class CheckedRows:
    """The rows whose file is there, as segments, and what is wrong with any row."""

    segments: Segments
    lines: Sequence[int]
    """Where the row of each segment starts."""
    problems: Sequence[Problem]


def check_rows(
    sheet: Sheet, *, audio_root: Path, progress: Callable[[int, int], None] | None = None
) -> CheckedRows:
    """Every row checked; reads the headers of recordings whose row gives no duration.

    A recording without a readable header, or without samples, is a segment of no length.
    """
    paths, problems = _paths(sheet, audio_root)
    starts_s, start_problems = second_cells(sheet, "start_s", zero_allowed=True)
    given_s, duration_problems = second_cells(sheet, "duration_s", zero_allowed=False)
    durations_s, end_problems = _durations_s(sheet, paths, starts_s, given_s, audio_root, progress)
    names = text_cells(sheet, "clip_id")
    views, view_problems = view_cells(sheet)
    rows = [row for row, path in enumerate(paths) if path is not None]
    segments = Segments(
        paths=[path for path in paths if path is not None],
        clip_ids=[names[row] for row in rows],
        starts_s=[starts_s[row] or 0.0 for row in rows],
        durations_s=[durations_s[row] for row in rows],
        views=[views[row] for row in rows],
    )
    problems += start_problems + duration_problems + end_problems + split_problems(sheet)
    problems += view_problems
    return CheckedRows(segments, [sheet.lines[row] for row in rows], problems)


def _paths(sheet: Sheet, audio_root: Path) -> tuple[list[str | None], list[Problem]]:
    """The path of each row below the audio root; None where no file can be read there."""
    roots = root_names(audio_root)
    paths: list[str | None] = []
    problems = []
    for line, cell in zip(sheet.lines, text_cells(sheet, "path"), strict=True):
        try:
            paths.append(relative_path(cell or "", roots=roots))
        except UnusablePathError as error:
            paths.append(None)
            problems.append(Problem(sheet.file, line, "path", str(error)))
    troubles = file_troubles({path for path in paths if path}, audio_root=audio_root)
    for row, path in enumerate(paths):
        if path in troubles:
            message = f"{path!r}: {troubles[path]}"
            problems.append(Problem(sheet.file, sheet.lines[row], "path", message))
            paths[row] = None
    if trouble := decoder_trouble(path for path in paths if path):
        # One mistake, not one a row; no clip of the table can be decoded before it is put right.
        return [None] * len(paths), [*problems, Problem(sheet.file, None, "path", trouble)]
    return paths, problems


def _durations_s(
    sheet: Sheet,
    paths: Sequence[str | None],
    starts_s: Sequence[float | None],
    given_s: Sequence[float | None],
    audio_root: Path,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[float], list[Problem]]:
    """The length of each row's segment, to the end of its recording where none is given."""
    pairs = zip(paths, given_s, strict=True)
    unknown = {path for path, given in pairs if path is not None and given is None}
    recordings_s = recording_durations_s(unknown, audio_root=audio_root, progress=progress)
    durations_s, problems = [], []
    for row, (path, given) in enumerate(zip(paths, given_s, strict=True)):
        start_s, recording_s = starts_s[row] or 0.0, recordings_s.get(path or "")
        if given is None and recording_s and start_s >= recording_s:
            message = f"found {start_s:g}, but {path!r} ends at {recording_s:.3f} s"
            problems.append(Problem(sheet.file, sheet.lines[row], "start_s", message))
        left_s = max(0.0, recording_s - start_s) if recording_s else 0.0
        durations_s.append(left_s if given is None else given)
    return durations_s, problems
