"""Runs side by side: what each leaves is read, and refused where it was tested on other clips."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchbank.pipeline.errors import TrialError
from patchbank.probing.bootstrap import Samples
from patchbank.probing.comparison import Contestant, best_first, compare
from patchbank.probing.groups import group_numbers
from patchbank.probing.paired_files import JudgedClip, read_resamples, read_test_clips

NUMBER = float | int | None
RESULTS = {
    "task": str,
    "primary_metric": str,
    "std_over": str,
    "bank": str,
    "encoder_id": str,
    "n_resamples": int,
    "classes": list,
    "probes": dict,
    "scores": list,
    "bootstrap_over": dict,
}
"""What results.json must hold, and of which kind."""
SCORE = {
    "probe": str,
    "split": str,
    "metric": str,
    "mean": NUMBER,
    "std": NUMBER,
    "ci95": list,
    "n_seeds": int,
    "n_clips": int,
}
"""What each of its scores must hold."""


@dataclass(frozen=True)
class StoredRun:
    """A finished run of one label set."""

    name: str
    results: dict[str, Any]
    clips: list[JudgedClip]
    samples: dict[tuple[str, str], Samples]

    def score(self, probe: str, metric: str) -> dict[str, Any]:
        """The row of results.json for the test split."""
        for row in self.results["scores"]:
            if (row["probe"], row["split"], row["metric"]) == (probe, "test", metric):
                return dict(row)
        raise TrialError(f"found no test score of {probe} in {metric} in {self.name}")


def compare_runs(
    folders: Sequence[Path],
    *,
    metric: str | None = None,
    probes: Sequence[str] = (),
    all_pairs: bool = False,
) -> dict[str, Any]:
    """`scores` of all probes of all runs, the best first, and paired `comparisons` between them.

    `metric` is that which selects where it is None, `probes` are all where none is named. Raises
    `TrialError` where a run is not finished, or where runs were not tested on the same clips.
    """
    runs = read_runs(folders)
    check_comparable(runs)
    metric = _checked_metric(runs, metric)
    _check_named(runs, probes)
    places = {
        _label(run, probe, several=len(runs) > 1): (run, probe)
        for run in runs
        for probe in run.results["probes"]
        if not probes or probe in probes
    }
    contestants = [_contestant(name, *place, metric) for name, place in places.items()]
    comparisons = compare(contestants, metric=metric)
    return {
        "metric": metric,
        "n_groups": runs[0].results["bootstrap_over"]["n_groups"],
        "bootstrap_over": [run.results["bootstrap_over"]["column"] for run in runs],
        "n_resamples": min(len(one.samples) for one in contestants),
        "n_resamples_of_runs": {run.name: run.results["n_resamples"] for run in runs},
        "scores": [_row(one.name, *places[one.name], metric) for one in best_first(contestants)],
        "n_pairs": len(comparisons),
        # Whichever is the best, the data chose it: p is corrected for all pairs in any case.
        "comparisons": comparisons if all_pairs else comparisons[: len(contestants) - 1],
    }


def read_runs(folders: Sequence[Path]) -> list[StoredRun]:
    """The runs, by the shortest ends of their paths that tell them apart."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise TrialError("found the same run twice, expected different ones")
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    length = 1
    while len({one[-length:] for one in parts}) < len(parts):
        length += 1
    return ["/".join(one[-length:]) for one in parts]


def _read_run(folder: Path, name: str) -> StoredRun:
    path = folder / "results.json"
    if not path.is_file():
        sets = sorted(one.parent.name for one in folder.glob("*/results.json"))
        hint = f"name one of its label sets: {', '.join(str(folder / one) for one in sets)}"
        raise TrialError(
            f"found no results.json in {folder}, expected the --out of a finished train-probe; "
            + (hint if sets else "run its command again to finish it")
        )
    try:
        results = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise TrialError(
            f"{path} is damaged ({error}); train again: patchbank train-probe"
        ) from error
    clips, samples = read_test_clips(folder), read_resamples(folder)
    if not _is_whole(results) or (
        {(row["probe"], row["metric"]) for row in results["scores"]} != set(samples)
    ):
        raise TrialError(
            f"the files of {folder} are not of one run of this version; "
            "train again: patchbank train-probe"
        )
    return StoredRun(name, results, clips, samples)


def _is_whole(results: Any) -> bool:
    """Whether results.json holds all that is read here, each of its kind."""
    return (
        _has(results, RESULTS)
        and all(isinstance(one, str) for one in results["classes"])
        and _has(results["bootstrap_over"], {"column": str, "n_groups": int})
        and all(_has(facts, {"layers": list}) for facts in results["probes"].values())
        and all(
            _has(row, SCORE)
            and len(row["ci95"]) == 2
            and all(isinstance(bound, NUMBER) for bound in row["ci95"])
            for row in results["scores"]
        )
    )


def _has(found: Any, kinds: Mapping[str, Any]) -> bool:
    return isinstance(found, dict) and all(
        key in found and isinstance(found[key], kind) for key, kind in kinds.items()
    )


def check_comparable(runs: Sequence[StoredRun]) -> None:
    """Raises `TrialError` that names how the first two unlike runs differ."""
    first, *others = runs
    for run in others:
        differences = list(_differences(first, run))
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            raise TrialError(
                f"found runs that were not tested alike, expected the same test clips:\n{lines}\n"
                "only scores of the same clips, classes and groups can be compared"
            )


def _differences(one: StoredRun, other: StoredRun) -> list[str]:
    found = []
    if one.results["task"] != other.results["task"]:
        found.append(
            f"task: {one.results['task']} in {one.name}, {other.results['task']} in {other.name}"
        )
    found += _only("classes", one, other, *(run.results["classes"] for run in (one, other)))
    folds = [sorted({clip.fold for clip in run.clips}) for run in (one, other)]
    found += _only("folds", one, other, *folds)
    if folds[0] != folds[1]:
        return found
    clips = [[clip.clip_id for clip in run.clips] for run in (one, other)]
    found += _only("test clips", one, other, *clips)
    by_id = [{(clip.fold, clip.clip_id): clip for clip in run.clips} for run in (one, other)]
    common = [key for key in by_id[0] if key in by_id[1]]
    relabelled = [key for key in common if by_id[0][key].labels != by_id[1][key].labels]
    if relabelled:
        clip = by_id[0][relabelled[0]], by_id[1][relabelled[0]]
        found.append(
            f"labels of {len(relabelled)} test clips: {clip[0].clip_id!r} is "
            f"{_labels(clip[0])} in {one.name}, {_labels(clip[1])} in {other.name}"
        )
    if clips[0] == clips[1] and len(common) < len(one.clips):
        found.append(f"the folds of {len(one.clips) - len(common)} test clips")
    if not found and _numbers(one) != _numbers(other):
        columns = [run.results["bootstrap_over"]["column"] for run in (one, other)]
        found.append(
            f"groups of clips: by {columns[0]} in {one.name}, by {columns[1]} in {other.name}; "
            "train with the same --group"
        )
    return found


def _only(
    what: str, one: StoredRun, other: StoredRun, ours: Sequence[str], theirs: Sequence[str]
) -> list[str]:
    lines = []
    for run, own, foreign in ((one, ours, theirs), (other, theirs, ours)):
        lacking = sorted(set(own) - set(foreign))
        if lacking:
            examples = ", ".join(map(repr, lacking[:3])) + (", ..." if len(lacking) > 3 else "")
            lines.append(f"{what}: {len(lacking)} only in {run.name}: {examples}")
    return lines


def _labels(clip: JudgedClip) -> str:
    return ";".join(sorted(clip.labels)) or "without labels"


def _numbers(run: StoredRun) -> dict[str, list[int]]:
    """The groups of each fold's clips, as they are drawn."""
    numbers = {}
    for fold in sorted({clip.fold for clip in run.clips}):
        clips = [clip for clip in run.clips if clip.fold == fold]
        found = group_numbers([clip.clip_id for clip in clips], [clip.group for clip in clips])
        numbers[fold] = found.tolist()
    return numbers


def _checked_metric(runs: Sequence[StoredRun], metric: str | None) -> str:
    known = list(dict.fromkeys(found for _, found in runs[0].samples))
    metric = metric or str(runs[0].results["primary_metric"])
    if metric not in known:
        task = runs[0].results["task"]
        raise TrialError(
            f"found no metric {metric!r} in these {task} runs, expected one of {', '.join(known)}"
        )
    return metric


def _check_named(runs: Sequence[StoredRun], probes: Sequence[str]) -> None:
    known = list(dict.fromkeys(name for run in runs for name in run.results["probes"]))
    for probe in probes:
        if probe not in known:
            raise TrialError(
                f"found no probe {probe!r} in these runs, expected one of {', '.join(known)}"
            )


def _label(run: StoredRun, probe: str, *, several: bool) -> str:
    return f"{run.name}: {probe}" if several else probe


def _contestant(name: str, run: StoredRun, probe: str, metric: str) -> Contestant:
    row = run.score(probe, metric)
    n_groups = max(max(numbers) + 1 for numbers in _numbers(run).values())
    return Contestant(name, row["mean"], row["std"], run.samples[probe, metric], n_groups)


def _row(name: str, run: StoredRun, probe: str, metric: str) -> dict[str, Any]:
    results, score = run.results, run.score(probe, metric)
    return {
        "name": name,
        "run": run.name,
        "probe": probe,
        "layers": results["probes"][probe]["layers"],
        "encoder_id": results["encoder_id"],
        "encoder": results.get("encoder", ""),
        "bank": results["bank"],
        **{key: score[key] for key in ("mean", "std", "ci95", "n_seeds", "n_clips")},
        "std_over": results["std_over"],
    }
