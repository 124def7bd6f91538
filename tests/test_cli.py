from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from audio_sets import write_clip_set, write_tone

from patchbank.cli.main import main

WINDOW = ["--window-s", "1"]
QUICK = ["--epochs", "30", "--seeds", "2", "--lr", "0.05", "--probe", "linear"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set, a bank of it and a trained run."""
    folder = tmp_path_factory.mktemp("job")
    write_clip_set(folder / "set", n_clips=48)
    assert main(extract_line(folder)) == 0
    assert main(train_line(folder, "--probe", "protobin")) == 0
    return folder


def extract_line(folder: Path, *more: str) -> list[str]:
    line = ["extract", str(folder / "set/clips.csv"), "--encoder", "fake"]
    return [*line, "--out", str(folder / "fake.bank"), *WINDOW, *more]


def train_line(folder: Path, *more: str, labels: Path | None = None) -> list[str]:
    labels = labels or folder / "set/labels.csv"
    line = ["train-probe", str(folder / "fake.bank"), "--labels", str(labels)]
    return [*line, "--out", str(folder / "run"), *QUICK, *more]


def write_table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def error_of(capsys: pytest.CaptureFixture[str], line: list[str]) -> str:
    """What a failing command says; it says it on stderr, without a traceback, and leaves with 1."""
    capsys.readouterr()
    assert main(line) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said[said.index("error: ") :]


def test_a_label_table_that_is_named_twice_is_taken_once(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = train_line(job, "--labels", str(job / "set/labels.csv"))
    line[line.index("--out") + 1] = str(tmp_path / "run")
    assert main(line) == 0
    assert (tmp_path / "run/results.json").is_file()
    assert "one folder a probe" in capsys.readouterr().out


def test_a_run_leaves_results_probes_and_predictions(job: Path) -> None:
    results = json.loads((job / "run/results.json").read_text())
    assert results["bank"] == json.loads((job / "fake.bank/seal.json").read_text())["fingerprint"]
    scores = {(s["probe"], s["split"], s["metric"]): s for s in results["scores"]}
    assert scores["linear", "test", "accuracy"]["mean"] == 1.0
    assert scores["protobin", "test", "accuracy"]["n_clips"] == 12
    assert set(scores["linear", "valid", "accuracy"]) >= {"mean", "std", "n_seeds", "ci95"}
    for probe in ("linear", "protobin"):
        assert (job / "run" / probe / "probe.safetensors").is_file()
        assert json.loads((job / "run" / probe / "probe.json").read_text())["classes"]
        predictions = pq.read_table(job / "run" / probe / "predictions-test.parquet")
        assert predictions.num_rows == 12


@pytest.mark.parametrize(
    ("tier", "said"),
    [("auto", "tokens from ram: "), ("direct", "tokens from direct: as asked"), ("map", "map: as")],
)
def test_training_says_where_tokens_come_from(
    tier: str, said: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train-probe", str(job / "fake.bank"), "--labels", str(job / "set/labels.csv")]
    line += ["--out", str(tmp_path / "run"), "--probe", "linear", "--epochs", "1", "--seeds", "1"]
    assert main([*line, "--tier", tier]) == 0
    assert said in capsys.readouterr().err


def test_predict_labels_audio_window_by_window(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tone(tmp_path / "new/low.wav", hertz=210, duration_s=3.0)
    write_tone(tmp_path / "new/high.wav", hertz=2_030)
    assert main(["predict", str(job / "run"), str(tmp_path / "new"), "--top", "1", "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [(Path(row["clip"]).name, row["start_s"], next(iter(row["labels"]))) for row in said]
    assert found == [
        ("high.wav", 0.0, "high"),
        ("low.wav", 0.0, "low"),
        ("low.wav", 1.0, "low"),
        ("low.wav", 2.0, "low"),
    ]


def test_predict_on_audio_and_on_the_bank_agree(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(job / "run"), tmp_path / "scores.csv"
    bank_line = ["predict", run, "--bank", str(job / "fake.bank"), "--out", str(out)]
    assert main([*bank_line, "--probe", "protobin"]) == 0
    audio = str(job / "set/audio/0003.wav")
    assert main(["predict", run, audio, "--probe", "protobin", "--json", "--top", "2"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    table = {line["clip"]: line for line in csv.DictReader(out.read_text().splitlines())}
    for name, probability in row["labels"].items():
        assert float(table["audio/0003.wav"][name]) == pytest.approx(probability, abs=2e-6)
    predictions = pq.read_table(job / "run/protobin/predictions-test.parquet").to_pylist()
    assert {p["clip_id"] for p in predictions} <= set(table)


def test_predict_goes_on_past_a_recording_it_cannot_read(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    files = [str(tmp_path / name) for name in ("bad.wav", "gone.wav", "silent.wav")]
    assert main(["predict", str(job / "run"), *files]) == 1
    said = capsys.readouterr()
    assert "bad.wav" in said.err
    assert "gone.wav: there is no such file" in said.err
    assert "error: 2 recordings could not be read" in said.err
    assert "silent.wav  0.0-1.0 s" in said.out


def test_predict_refuses_another_encoder_and_names_the_fields(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights").write_bytes(b"other weights")
    weights = ["--weights", str(tmp_path / "weights")]
    audio = str(job / "set/audio/0000.wav")
    said = error_of(capsys, ["predict", str(job / "run"), audio, *weights])
    assert "trained on tokens of another encoder" in said
    assert "weights_sha256: found" in said
    other = tmp_path / "other.bank"
    line = ["extract", str(job / "set/clips.csv"), "--encoder", "fake", "--out", str(other)]
    assert main([*line, *weights, *WINDOW]) == 0
    said = error_of(capsys, ["predict", str(job / "run"), "--bank", str(other)])
    assert "weights_sha256: found" in said


def test_training_needs_no_audio_library_and_no_encoder(job: Path, tmp_path: Path) -> None:
    code = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"soundfile", "torchaudio", "distributed", "dask"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from patchbank.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    line = train_line(job)
    line[line.index("--out") + 1] = str(tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "run/results.json").is_file()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        pytest.param(
            lambda rows: [*rows, "audio/9999.wav,low"],
            "labels.csv:50:clip_id:",
            id="labels for an unknown clip",
        ),
        pytest.param(
            lambda rows: rows[:-2], "audio/0046.wav' has no labels", id="clips without labels"
        ),
        pytest.param(lambda rows: ["a,b", "1,2"], "column", id="no labels column"),
    ],
)
def test_wrong_labels_are_one_clear_error(
    rows: object, words: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (job / "set/labels.csv").read_text().splitlines()
    labels = write_table(tmp_path / "labels.csv", *rows(lines))  # type: ignore[operator]
    assert words in error_of(capsys, train_line(job, labels=labels))


def test_clips_without_labels_can_be_left_out(job: Path, tmp_path: Path) -> None:
    lines = (job / "set/labels.csv").read_text().splitlines()
    labels = write_table(tmp_path / "labels.csv", *lines[:-2])
    line = train_line(job, "--allow-unlabelled", labels=labels)
    line[line.index("--out") + 1] = str(tmp_path / "run")
    assert main(line) == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["n_unlabelled_clips"] == 2


def test_a_class_outside_the_vocabulary_is_an_error(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = write_table(tmp_path / "classes.txt", "high", "medium")
    said = error_of(capsys, train_line(job, "--classes", str(classes)))
    assert "'low'" in said
    assert "labels.csv:2:labels" in said


def test_a_class_without_positives_is_left_out_of_the_mean_and_counted(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = write_table(tmp_path / "classes.txt", "high", "low", "never")
    line = train_line(job, "--classes", str(classes), "--task", "multilabel")
    line[line.index("--out") + 1] = str(tmp_path / "run")
    capsys.readouterr()
    assert main(line) == 0
    assert "d_prime without 1 of 3 classes" in " ".join(capsys.readouterr().out.split())
    results = json.loads((tmp_path / "run/results.json").read_text())
    score = next(s for s in results["scores"] if (s["split"], s["metric"]) == ("test", "map_macro"))
    assert score["mean"] == 1.0


def test_an_empty_split_is_an_error_that_says_which(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"audio/{row:04d}.wav,{'train' if row % 2 else 'test'}" for row in range(48)]
    splits = write_table(tmp_path / "splits.csv", "clip_id,split", *rows)
    assert "valid" in error_of(capsys, train_line(job, "--splits", str(splits)))


def test_what_is_no_bank_or_no_finished_bank_is_told_apart(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = train_line(job)
    line[1] = str(tmp_path)
    assert "no bank at" in error_of(capsys, line)
    copy = shutil.copytree(job / "fake.bank", tmp_path / "copy.bank")
    (copy / "seal.json").unlink()
    line[1] = str(copy)
    assert "not sealed" in error_of(capsys, line)


def test_a_folder_of_class_folders_gives_its_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(6):
        write_tone(tmp_path / f"set/dog/{index}.wav", hertz=200 + index)
        write_tone(tmp_path / f"set/cat/{index}.wav", hertz=2_000 + index)
    line = ["extract", str(tmp_path / "set"), "--encoder", "fake", *WINDOW]
    assert main([*line, "--out", str(tmp_path / "x.bank")]) == 0
    assert "x.labels.csv" in capsys.readouterr().out
    rows = csv.DictReader((tmp_path / "x.labels.csv").read_text().splitlines())
    labels = {row["clip_id"]: row["labels"] for row in rows}
    assert labels["dog/3.wav"] == "dog"
    assert len(labels) == 12


def test_failed_clips_are_told_and_do_not_fail_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tone(tmp_path / "set/good.wav", hertz=200)
    (tmp_path / "set/bad.wav").write_bytes(b"RIFF")
    line = ["extract", str(tmp_path / "set"), "--encoder", "fake", *WINDOW]
    assert main([*line, "--out", str(tmp_path / "x.bank")]) == 0
    said = capsys.readouterr()
    assert "failed: bad.wav: " in said.err
    assert "2 clips, 1 failed" in said.out


def test_a_dry_run_writes_nothing_and_counts(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = extract_line(job, "--dry-run", "--json", "--layers", "all")
    line[line.index("--out") + 1] = str(job / "dry.bank")
    capsys.readouterr()
    assert main(line) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["clips"], facts["shards"], facts["shards_missing"]) == (48, 3, 3)
    assert facts["layers"]["2"] == {"grid": [5, 2], "dim": 12, "prefix": 1}
    assert not (job / "dry.bank").exists()


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("extract", id="missing arguments"),
        pytest.param("extract x --encoder fake --out y --pad mirror", id="unknown pad rule"),
        pytest.param("extract x --encoder fake --out y --layers a", id="unknown layers"),
        pytest.param("train-probe x --labels y --out z --epochs 0", id="no epochs"),
        pytest.param("predict run", id="nothing to predict"),
        pytest.param("bake", id="unknown command"),
    ],
)
def test_misuse_leaves_with_two(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert "Usage" in capsys.readouterr().err


def test_lists_of_encoders_and_probes_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoders"]) == 0
    encoders = capsys.readouterr().out
    assert main(["probes"]) == 0
    probes = capsys.readouterr().out
    assert "efficientat" in encoders
    assert "MIT" in encoders
    assert "protobin" in probes
    assert max(len(line) for line in (encoders + probes).splitlines()) <= 80


def test_labels_corrected_by_hand_survive_the_same_command(tmp_path: Path) -> None:
    write_tone(tmp_path / "set/dog/0.wav", hertz=200)
    line = ["extract", str(tmp_path / "set"), "--encoder", "fake", *WINDOW]
    line += ["--out", str(tmp_path / "x.bank")]
    assert main(line) == 0
    (tmp_path / "x.labels.csv").write_text("clip_id,labels\ndog/0.wav,wolf\n")
    assert main(line) == 0
    assert "wolf" in (tmp_path / "x.labels.csv").read_text()


def test_a_set_of_which_nothing_can_be_decoded_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.wav").write_bytes(b"no audio")
    line = ["extract", str(tmp_path / "set"), "--encoder", "fake", *WINDOW]
    said = error_of(capsys, [*line, "--out", str(tmp_path / "x.bank")])
    assert "all 1 clips" in said


def test_an_output_that_cannot_be_written_is_told_before_the_work(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    line = train_line(job)
    line[line.index("--out") + 1] = str(tmp_path / "file/run")
    assert "cannot write results to" in error_of(capsys, line)
    line = extract_line(job)
    line[line.index("--out") + 1] = str(tmp_path / "file/x.bank")
    assert str(tmp_path / "file") in error_of(capsys, line)


def test_a_failing_prediction_leaves_an_older_table_alone(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write_table(tmp_path / "scores.csv", "keep me")
    for what in (["--bank", str(tmp_path / "none.bank")], [str(tmp_path / "none.wav")]):
        error_of(capsys, ["predict", str(job / "run"), *what, "--out", str(old)])
        assert old.read_text() == "keep me\n"
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_a_device_that_is_not_there_is_one_clear_error(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "found no device 'cuda:77'" in error_of(capsys, train_line(job, "--device", "cuda:77"))
    said = error_of(capsys, extract_line(job, "--device", "nonsense"))
    assert "no device 'nonsense' here" in said


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("results.json", "{}"),
        ("results.json", "{"),
        ("linear/probe.json", "{"),
        ("linear/probe.json", "[]"),
        ("linear/probe.json", '{"format": 1}'),
    ],
)
def test_a_damaged_run_is_one_clear_error(
    file: str, content: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(job / "run", tmp_path / "run")
    (run / file).write_text(content)
    audio = str(job / "set/audio/0000.wav")
    assert "train" in error_of(capsys, ["predict", str(run), audio, "--probe", "linear"])


def test_ctrl_c_says_that_an_extraction_can_go_on(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from patchbank.pipeline import extraction

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(extraction, "run", stop)
    assert main(extract_line(job)) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
