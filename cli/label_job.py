"""One call of `patchbank predict`: rows of a predictor, written where they are to go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from patchbank.cli.bars import recording_bar
from patchbank.cli.label_folder import begin_folder, is_labelled
from patchbank.cli.label_formats import SUFFIX_OF, WRITERS, Shown, TextSink, Writer
from patchbank.cli.label_output import Format, Output
from patchbank.cli.out_file import check_parent
from patchbank.cli.predictor import Prediction, Predictor
from patchbank.cli.recordings import label_files, recordings
from patchbank.pipeline.audio import probe_duration_s
from patchbank.pipeline.errors import AudioError, PatchbankError, TrialError
from patchbank.probing.atomic import write_atomically
from patchbank.probing.plain_text import printable

Work = Callable[[Path, Iterable[Prediction]], object]


class LabelJob:
    """What is to be labelled differs between its methods, and where labels go between outputs."""

    def __init__(self, predictor: Predictor, output: Output, *, frames: bool) -> None:
        self._predictor, self._output, self._frames = predictor, output, frames
        self._shown = Shown(predictor.artefact, output.top, output.threshold)

    def bank(self, place: str) -> None:
        """Labels the clips of a bank, at a path or an address."""
        rows = self._predictor.bank(place, frames=self._frames)
        with self._one_place() as write:
            write(rows)

    def audio(self, named: Sequence[Path]) -> None:
        """Labels recordings into one place; raises at the end if some could not be read."""
        found = list(recordings(named))
        if self._output.format == "audacity" and len(found) != 1:
            raise TrialError(
                f"found {len(found)} recordings, expected one for a label track; give a folder "
                "for a track of each: --out FOLDER"
            )
        with self._one_place() as write:
            n_failed = self._each(found, lambda _, rows: write(rows))
            if n_failed == len(found):
                raise _unread(n_failed)
        if n_failed:
            raise _unread(n_failed)

    def folder(self, named: Sequence[Path], out: Path) -> None:
        """Labels each recording into a file of its own, but those that an earlier call did."""
        found, suffix = list(recordings(named)), SUFFIX_OF[self._output.format]
        files = label_files(named, found, out, suffix)
        asked = {
            "format_of_files": self._output.format,
            "frames": self._frames,
            "top": self._output.top,
            "threshold": self._output.threshold,
        }
        begun = begin_folder(out, self._predictor.folder, asked)
        left = [path for path, file in files.items() if not is_labelled(path, file, begun)]
        if len(left) < len(files):
            print(f"{len(files) - len(left)} already labelled", file=sys.stderr)
        n_failed = self._each(left, lambda path, rows: self._write_file(files[path], rows))
        print(f"{out}: {_counted(len(left) - n_failed)} labelled", file=sys.stderr)
        if n_failed:
            raise _unread(n_failed)

    def _write_file(self, path: Path, rows: Iterable[Prediction]) -> None:
        def write(temporary: Path) -> None:
            with self._file(temporary) as write_rows:
                write_rows(rows)

        write_atomically(path, write)

    @contextmanager
    def _one_place(self) -> Iterator[Callable[[Iterable[Prediction]], None]]:
        """What writes rows to stdout or to the file, which is renamed at the end: whatever goes
        wrong before leaves an older one as it was."""
        out = self._output.path
        if out is None:
            with self._stream(sys.stdout) as write:
                yield write
            return
        check_parent(out)
        draft = out.with_name(f".{out.name}.draft")
        try:
            with self._file(draft) as write:
                yield write
            draft.replace(out)
        finally:
            draft.unlink(missing_ok=True)

    @contextmanager
    def _file(self, path: Path) -> Iterator[Callable[[Iterable[Prediction]], None]]:
        with (
            path.open("w", newline="", encoding="utf-8") as file,
            self._stream(file) as write,
        ):
            yield write

    @contextmanager
    def _stream(self, file: TextSink) -> Iterator[Callable[[Iterable[Prediction]], None]]:
        writers = [self._writer(file, self._output.format)]
        if self._output.prints_json:
            writers.append(self._writer(sys.stdout, "json"))

        def write(rows: Iterable[Prediction]) -> None:
            for row in rows:
                for writer in writers:
                    writer.row(row)

        yield write
        for writer in writers:
            writer.end()

    def _writer(self, file: TextSink, format_: Format) -> Writer:
        return WRITERS[format_](file, self._shown, frames=self._frames)

    def _each(self, found: Sequence[Path], work: Work) -> int:
        """`work` for every recording; tells of those that cannot be read, and counts them."""
        n_failed = 0
        # Rows on a terminal show how far it is, and a bar would stand between them.
        prints_rows = self._output.path is None and sys.stdout.isatty()
        with nullcontext(None) if prints_rows else recording_bar("labelling") as show:
            for index, path in enumerate(found):
                try:
                    work(path, self._rows(path, index, len(found), show))
                except AudioError as error:
                    n_failed += 1
                    print(printable(f"failed: {path}: {error}"), file=sys.stderr)
        return n_failed

    def _rows(
        self, path: Path, index: int, n: int, show: Callable[[int, float, int], None] | None
    ) -> Iterator[Prediction]:
        rows = self._predictor.audio(path, frames=self._frames)
        if show is None:
            yield from rows
            return
        length_s = None
        for row in rows:
            yield row
            length_s = length_s or probe_duration_s(path) or row.end_s
            show(index, min(1.0, row.end_s / length_s), n)
        show(index + 1, 0.0, n)


def _unread(n_failed: int) -> PatchbankError:
    return PatchbankError(f"{_counted(n_failed)} could not be read")


def _counted(n: int) -> str:
    return f"{n} recording{'s' * (n != 1)}"
