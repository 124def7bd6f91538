"""`patchbank predict` and `Predictor`: what they say, where they write it, what they refuse."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_sets import write_clip_set, write_tone
from sklearn.metrics import roc_auc_score

from patchbank.cli.label_formats import AudacityWriter, Shown
from patchbank.cli.main import main
from patchbank.cli.predictor import Prediction, Predictor
from patchbank.cli.recordings import label_files
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.errors import AudioError, BankMismatch, TrialError
from patchbank.pipeline.extraction import ExtractionSettings, extract
from patchbank.pipeline.specs import WindowSpec
from patchbank.probing.artefact import ProbeArtefact
from patchbank.probing.entries import parse_probe
from patchbank.probing.frames import TIMELESS
from patchbank.probing.probes.base import ProbeShape
from patchbank.probing.run import run_training
from patchbank.probing.settings import TrainSettings

RATE_HZ = 16_000
FAMILIES = ("linear", "protobin", "conv:channels=2", "linear-cls")


def trained(folder: Path, bank: Bank, probes: Sequence[str], *, rate: float) -> None:
    """A multi-label run in `folder`, from its labels.csv."""
    entries = [parse_probe(text) for text in probes]
    settings = TrainSettings(
        n_seeds=1,
        learning_rates={entry.name: (rate,) for entry in entries},
        n_resamples=100,
        device="cpu",
    )
    labels = folder / "labels.csv"
    run_training(bank, labels, folder / "run", probes=entries, settings=settings, task="multilabel")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of tones of one second, and a multi-label run of some probes on it."""
    folder = tmp_path_factory.mktemp("predict")
    table = write_clip_set(folder, n_clips=32)
    settings = ExtractionSettings(window=WindowSpec(1.0, 1.0))
    bank = extract(table, encoder="fake", out=folder / "fake.bank", settings=settings)
    trained(folder, bank, FAMILIES, rate=0.05)
    return folder


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings in folders: 2.5 s low, and 1 s high twice under names that are nearly one."""
    folder = tmp_path_factory.mktemp("new")
    write_tone(folder / "a/low.wav", hertz=210, duration_s=2.5)
    write_tone(folder / "a/tone.wav", hertz=2_030)
    shutil.copy(folder / "a/tone.wav", folder / "a/tone#.wav")
    write_tone(folder / "b/tone.wav", hertz=2_030)
    return folder


def predicted(capsys: pytest.CaptureFixture[str], job: Path, *words: object) -> str:
    """What a call prints on stdout."""
    capsys.readouterr()
    line = ["predict", str(job / "run"), "--probe", "linear", *map(str, words)]
    assert main([*line, "--device", "cpu"]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], status: int, *words: object) -> str:
    capsys.readouterr()
    assert main(["predict", *map(str, words)]) == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return " ".join(said.replace("│", " ").split())


def test_three_lines_of_python_label_a_folder(job: Path, new: Path) -> None:
    predictor = Predictor(job / "run", probe="linear")
    rows = list(predictor.audio(new / "a"))
    assert [(Path(row.clip).name, row.start_s, row.end_s) for row in rows] == [
        ("low.wav", 0.0, 1.0),
        ("low.wav", 1.0, 2.0),
        ("low.wav", 2.0, 2.5),
        ("tone#.wav", 0.0, 1.0),
        ("tone.wav", 0.0, 1.0),
    ]
    likeliest = [predictor.classes[row.probabilities.argmax()] for row in rows]
    assert likeliest == ["low", "low", "low", "high", "high"]
    assert predictor.folder == job / "run/linear"


def test_python_and_the_command_line_say_the_same(
    job: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for frames in (False, True):
        rows = list(Predictor(job / "run", probe="linear").audio(new / "a", frames=frames))
        table = predicted(capsys, job, new / "a", "--format", "csv", *["--frames"] * frames)
        found = list(csv.DictReader(table.splitlines()))
        assert len(rows) == len(found)
        for row, line in zip(rows, found, strict=True):
            span = (float(line["start_s"]), float(line["end_s"]))
            assert (row.start_s, row.end_s) == pytest.approx(span)
            assert row.clip == line["clip"]
            stated = [float(line["high"]), float(line["low"])]
            assert row.probabilities.tolist() == pytest.approx(stated, abs=1e-6)


def test_waveforms_are_labelled_as_the_files_they_are_of(job: Path, new: Path) -> None:
    samples, rate_hz = soundfile.read(new / "a/low.wav", dtype="float32")
    predictor = Predictor(job / "run", probe="linear")
    for frames in (False, True):
        of_file = list(predictor.audio(new / "a/low.wav", frames=frames))
        found = list(predictor.waveform(np.stack([samples, samples]), rate_hz, frames=frames))
        assert [row.clip for row in found] == ["0"] * len(of_file) + ["1"] * len(of_file)
        for one, other in zip(found, of_file * 2, strict=True):
            assert (one.start_s, one.end_s) == (other.start_s, other.end_s)
            np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-4)
    with pytest.raises(TrialError, match=r"samples of shape \(40000,\), expected \(batch, sample"):
        predictor.waveform(samples, rate_hz)
    with pytest.raises(TrialError, match="samples that are NaN or infinite"):
        predictor.waveform(np.full((1, 9), np.nan), rate_hz)


def test_a_bank_has_the_frames_of_its_recordings(job: Path) -> None:
    predictor = Predictor(job / "run", probe="protobin")
    of_bank = list(predictor.bank(job / "fake.bank", frames=True))
    assert len(of_bank) == 32 * 5
    of_audio = list(predictor.audio(job / "audio/0007.wav", frames=True))
    same = [row for row in of_bank if row.clip == "audio/0007.wav"]
    for one, other in zip(same, of_audio, strict=True):
        assert (one.start_s, one.end_s) == pytest.approx((other.start_s, other.end_s))
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=2e-3)


def test_frames_divide_a_window_and_end_where_its_audio_ends(job: Path, new: Path) -> None:
    rows = list(Predictor(job / "run", probe="linear").audio(new / "a/low.wav", frames=True))
    ends = [row.end_s for row in rows]
    # Five steps a window of a second; half a second of audio in the last one fills three.
    assert ends == pytest.approx([*np.arange(1, 13) / 5, 2.5])
    assert [row.start_s for row in rows] == pytest.approx([0, *ends[:-1]])


@pytest.fixture(scope="module")
def beeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of noise in which two tones of one second may sound, and probes on them."""
    folder = tmp_path_factory.mktemp("beeps")
    random = np.random.default_rng(0)
    clips, labels = ["path,split"], ["path,labels"]
    for index in range(48):
        names = [(), ("low",), ("high",), ("low", "high")][index % 4]
        write_beeps(
            folder / f"{index}.wav", {name: int(random.integers(3)) for name in names}, seed=index
        )
        split = ("train", "train", "train", "train", "valid", "test")[index // 4 % 6]
        clips.append(f"{index}.wav,{split}")
        labels.append(f"{index}.wav,{';'.join(names)}")
    for name, lines in (("clips", clips), ("labels", labels)):
        (folder / f"{name}.csv").write_text("\n".join(lines))
    settings = ExtractionSettings(window=WindowSpec(3.0, 3.0))
    for encoder in ("fake", "tiny"):
        own = folder / encoder
        bank = extract(folder / "clips.csv", encoder=encoder, out=own / "x.bank", settings=settings)
        shutil.copy(folder / "labels.csv", own)
        trained(own, bank, ("protobin",), rate=0.02)
    return folder


def write_beeps(path: Path, seconds: dict[str, int], *, seed: int) -> None:
    random, time_s = np.random.default_rng(seed), np.arange(RATE_HZ) / RATE_HZ
    samples = 0.02 * random.standard_normal(3 * RATE_HZ)
    for name, second in seconds.items():
        hertz = {"low": 400, "high": 2_500}[name]
        span = slice(second * RATE_HZ, (second + 1) * RATE_HZ)
        samples[span] += 0.2 * np.sin(2 * np.pi * hertz * time_s)
    soundfile.write(path, samples, RATE_HZ)


@pytest.mark.parametrize("encoder", ["fake", "tiny"])
def test_frames_light_up_where_a_tone_sounds(encoder: str, beeps: Path, tmp_path: Path) -> None:
    seconds = {"low": 2, "high": 0}
    write_beeps(tmp_path / "new.wav", seconds, seed=99)
    predictor = Predictor(beeps / encoder / "run", device="cpu")
    rows = list(predictor.audio(tmp_path / "new.wav", frames=True))
    assert rows[-1].end_s == pytest.approx(3)
    middle = np.array([(row.start_s + row.end_s) / 2 for row in rows])
    for name, second in seconds.items():
        evidence = [row.probabilities[predictor.classes.index(name)] for row in rows]
        assert roc_auc_score(middle.astype(int) == second, evidence) > 0.9


def test_a_label_track_has_a_region_for_each_stretch_of_a_class(
    job: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = predicted(capsys, job, new / "a/low.wav", "--frames", "--format", "audacity")
    assert said == "0.000000\t2.500000\tlow\n"
    out = tmp_path / "track.txt"
    assert predicted(capsys, job, new / "a/low.wav", "--out", out) == ""
    assert out.read_text() == said


def two_classes() -> ProbeArtefact:
    return ProbeArtefact("linear", {}, ("a\tcat", "dog"), True, ProbeShape(4, 2), {})


def test_regions_join_what_touches_or_overlaps_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "track.txt"
    with file.open("w") as out:
        writer = AudacityWriter(out, Shown(two_classes(), threshold=0.5))
        for start_s, end_s, cat, dog in (
            (0.0, 1.0, 0.9, 0.5),
            (0.5, 1.5, 0.8, 0.1),
            (1.0, 2.0, 0.2, 0.1),
            (1.5, 2.5, 0.6, 0.7),
            (3.0, 4.0, 0.6, 0.7),
        ):
            writer.row(Prediction("x", start_s, end_s, np.array([cat, dog], dtype=np.float32)))
        writer.end()
    assert [line.split("\t") for line in file.read_text().splitlines()] == [
        ["0.000000", "1.000000", "dog"],
        ["0.000000", "2.500000", "a cat"],
        ["1.500000", "2.500000", "dog"],
        ["3.000000", "4.000000", "a cat"],
        ["3.000000", "4.000000", "dog"],
    ]


def test_thresholds_choose_the_classes_of_a_row(
    job: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = new / "a/tone.wav"
    every = json.loads(predicted(capsys, job, file, "--json"))["labels"]
    assert set(every) == {"low", "high"}
    none = predicted(capsys, job, file, "--threshold", "1")
    assert none == f"{file}  0.0-1.0 s  -\n"
    assert json.loads(predicted(capsys, job, file, "--json", "--threshold", "0"))["labels"] == every
    chosen = json.loads(predicted(capsys, job, file, "--json", "--threshold", "chosen"))["labels"]
    predictor = Predictor(job / "run", probe="linear")
    thresholds = dict(zip(predictor.classes, predictor.artefact.thresholds, strict=True))
    assert chosen == {name: p for name, p in every.items() if p >= thresholds[name]}
    assert set(chosen) == {"high"}
    assert len(json.loads(predicted(capsys, job, file, "--json", "--top", "1"))["labels"]) == 1


def test_a_folder_gets_a_file_for_each_recording_in_its_place(
    job: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels"
    for format_, suffix in (("csv", ".csv"), ("json", ".jsonl"), ("audacity", ".txt")):
        predicted(capsys, job, new, "--out", out / format_, "--format", format_)
        found = sorted(
            path.relative_to(out / format_).as_posix() for path in (out / format_).rglob("*.*")
        )
        odd = [name for name in found if name.startswith("a/tone_.wav-")]
        assert len(odd) == 1
        assert set(found) - set(odd) == {
            f"a/low.wav{suffix}",
            f"a/tone.wav{suffix}",
            f"b/tone.wav{suffix}",
            "predict.json",
        }
    track = (out / "audacity/a/low.wav.txt").read_text()
    assert track == "0.000000\t2.500000\tlow\n"
    lines = (out / "json/a/low.wav.jsonl").read_text().splitlines()
    assert [json.loads(line)["end_s"] for line in lines] == [1.0, 2.0, 2.5]


def test_a_batch_that_was_stopped_goes_on_where_it_was(
    job: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio, out = shutil.copytree(new, tmp_path / "audio"), tmp_path / "labels"
    line = ["predict", str(job / "run"), str(audio), "--out", str(out), "--device", "cpu"]
    assert main(line) == 0
    files = sorted(out.rglob("*.csv"))
    assert len(files) == 4
    written = {path: path.read_bytes() for path in files}
    later = files[1].stat().st_mtime + 5
    files[0].unlink()
    os.utime(audio / "b/tone.wav", (later, later))
    before = {path: path.stat().st_mtime_ns for path in files[1:]}
    capsys.readouterr()
    assert main(line) == 0
    said = capsys.readouterr().err
    assert "2 already labelled" in said
    assert "2 recordings labelled" in said
    assert {path: path.read_bytes() for path in files} == written
    after = {path: path.stat().st_mtime_ns for path in files[1:]}
    assert [path.parent.name for path in before if before[path] != after[path]] == ["b"]
    for more in (["--frames"], ["--format", "audacity"], ["--probe", "protobin"]):
        assert "holds labels that differ in" in refused(capsys, 1, *line[1:], *more)
    (out / "predict.json").write_text("{")
    assert "predict.json is damaged" in refused(capsys, 1, *line[1:])


def test_labels_that_lay_there_before_are_made_again(
    job: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "labels/a/low.wav.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    past = stale.stat().st_mtime - 60
    os.utime(stale, (past, past))
    predicted(capsys, job, new, "--out", tmp_path / "labels")
    assert stale.read_text().startswith("clip,start_s,end_s,high,low")


def test_a_recording_that_cannot_be_read_leaves_the_others(
    job: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = shutil.copytree(new, tmp_path / "audio")
    (audio / "bad.wav").write_bytes(b"no audio")
    message = "error: 1 recording could not be read"
    assert message in refused(capsys, 1, job / "run", audio, "--out", tmp_path / "labels")
    assert len(list((tmp_path / "labels").rglob("*.csv"))) == 4
    assert message in refused(capsys, 1, job / "run", audio, "--out", tmp_path / "all.csv")
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + 6
    failed: list[Path] = []
    predictor = Predictor(job / "run")
    rows = predictor.audio(audio, on_failure=lambda path, error: failed.append(path))
    assert len(list(rows)) == 6
    assert failed == [audio / "bad.wav"]
    with pytest.raises(AudioError):
        list(predictor.audio(audio / "bad.wav"))


def test_names_of_label_files_never_meet_and_never_leave_their_folder(tmp_path: Path) -> None:
    audio, out = tmp_path / "audio", tmp_path / "out"
    (audio / "x.tar").mkdir(parents=True)
    members = [audio / "x.tar" / name for name in ("a?.wav", "a*.wav", "../../../up.wav")]
    files = label_files([audio], members, out, ".txt")
    assert len(set(files.values())) == 3
    for file in files.values():
        assert ".." not in file.parts
        assert file.is_relative_to(out)
    two = label_files([audio / "1/a.wav", audio / "2/a.wav"], [audio / "1/a.wav"], out, ".csv")
    assert list(two.values()) == [out / "1/a.wav.csv"]
    with pytest.raises(TrialError, match="differ in upper and lower case only"):
        label_files([audio], [audio / "a.wav", audio / "A.wav"], out, ".csv")


MISUSED = {
    "nothing to label": ([], "give audio files, or --bank X.bank"),
    "a threshold above one": (["x.wav", "--threshold", "2"], "found --threshold 2, expected a pro"),
    "a threshold in words": (["x.wav", "--threshold", "high"], "found --threshold high, expected"),
    "a threshold of NaN": (["x.wav", "--threshold", "nan"], "found --threshold nan, expected"),
    "no class": (["x.wav", "--top", "0"], "greater than or equal to 1"),
    "an unknown format": (["x.wav", "--format", "xml"], "'xml' is not one of 'text', 'csv'"),
    "two formats": (["x.wav", "--json", "--format", "csv"], "give --json or --format"),
    "some of a CSV": (["x.wav", "--format", "csv", "--top", "1"], "a CSV holds every class"),
    "text for a folder": (["x.wav", "--format", "text", "--out", "d"], "text is printed"),
    "a track of a bank": (["--bank", "x", "--format", "audacity"], "a label track is of a recordi"),
}


@pytest.mark.parametrize(("words", "message"), MISUSED.values(), ids=MISUSED)
def test_options_that_mean_nothing_together_are_misuse(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, 2, "run", *words)


def test_what_cannot_be_labelled_says_why(
    job: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = job / "run", new / "a/low.wav"
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no audio")
    assert "there is no such file" in refused(capsys, 1, run, tmp_path / "gone.wav")
    assert "notes.txt: " in refused(capsys, 1, run, tmp_path / "notes.txt")
    assert "no audio" in refused(capsys, 1, run, tmp_path / "empty")
    missing = tmp_path / "missing/x.csv"
    assert "found no folder" in refused(capsys, 1, run, file, "--out", missing)
    assert "found 4 recordings, expected one for a label track" in refused(
        capsys, 1, run, new, "--format", "audacity"
    )
    frames = [run, file, "--frames", "--probe"]
    assert "'conv' minds the order of time" in refused(capsys, 1, *frames, "conv-channels=2")
    assert "'linear-cls' says the same" in refused(capsys, 1, *frames, "linear-cls")


def test_another_encoder_is_refused_before_a_row(job: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"other weights")
    predictor = Predictor(job / "run", weights=str(tmp_path / "weights"))
    with pytest.raises(BankMismatch, match="trained on tokens of another encoder"):
        predictor.audio(job / "audio/0000.wav")


def test_an_open_bank_is_labelled_too(job: Path) -> None:
    rows = list(Predictor(job / "run").bank(open_bank(job / "fake.bank")))
    assert len(rows) == 32


PAGE = (Path(__file__).parents[1] / "docs/predict.md").read_text(encoding="utf-8")


def test_the_page_has_every_option_and_every_field(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["predict", "--help"]) == 0
    options = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help"}
    assert len(options) > 10
    assert {
        option for option in options if f"`{option}" not in PAGE and option != "--bank"
    } == set()
    stored = json.loads((job / "run/linear/probe.json").read_text())
    names = {*stored, *stored["training"], *stored["validation"], *stored["shape"]}
    assert {name for name in names if f"`{name}`" not in PAGE} == set()


def test_the_page_names_the_probes_that_have_frames() -> None:
    text = " ".join(PAGE.split())
    assert f"says something to: {', '.join(TIMELESS)}, mixes of layers" in text
