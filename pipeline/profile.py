"""What an extraction spent its time on, and the one stage to fix next."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from patchbank.pipeline.bank.writer import write_durably
from patchbank.pipeline.job import ShardReport
from patchbank.pipeline.specs import Json, human_bytes
from patchbank.pipeline.stages import (
    COPY,
    DECODE,
    ENCODER,
    FRONT_END,
    HASH,
    QUANTISE,
    RESAMPLE,
    STAGES,
    WRITE,
)

BUSY_ENOUGH = 0.5
"""Below it nobody is the limit: the run is too short, or waits for something else."""
ADVICE = {
    DECODE: "more cores or workers; --decode-in processes where the codec holds Python's lock",
    RESAMPLE: "store the audio at the encoder's rate",
    FRONT_END: "a faster device, more of them (--devices all)",
    ENCODER: "a faster device, more of them (--devices all), or --compile",
    QUANTISE: "--dtype float16",
    COPY: "a smaller --dtype, or fewer --layers",
    HASH: "more cores, or a smaller --dtype",
    WRITE: "a faster disk for --out, or a smaller --dtype",
}


@dataclass(frozen=True)
class StageShare:
    """One stage of all workers."""

    stage: str
    who: str
    """The threads that work at it."""
    n_threads: float
    """How many of them all workers have together, over the time that the workers were there."""
    busy_s: float
    """Summed over these threads. Threads that wait for a core count as busy."""
    share: float
    """Of these threads' time."""
    clips_per_s: float | None
    """What they would do if this stage were all; None where it takes no time."""


@dataclass(frozen=True)
class Profile:
    """Where the time went, over all workers of a run."""

    n_clips: int
    elapsed_s: float
    """From the first shard's start to the last shard's end."""
    peak_bytes: int
    """The most memory that the process of a worker held."""
    stages: tuple[StageShare, ...]

    @property
    def idle(self) -> dict[str, float]:
        """Which share of their time each kind of thread waited, for others or for work."""
        busy: dict[str, float] = {}
        for stage in self.stages:
            busy[stage.who] = busy.get(stage.who, 0.0) + stage.share
        return {who: max(0.0, 1.0 - share) for who, share in busy.items()}

    @property
    def fix_next(self) -> StageShare | None:
        """The longest stage of the threads that wait least; None where all mostly wait."""
        idle = self.idle
        busiest = min(idle, key=lambda who: idle[who], default=None)
        if busiest is None or idle[busiest] > 1 - BUSY_ENOUGH:
            return None
        return max((s for s in self.stages if s.who == busiest), key=lambda stage: stage.busy_s)

    @property
    def advice(self) -> str:
        """The one stage to fix next, and how."""
        stage = self.fix_next
        if stage is None:
            return "nothing: all threads mostly waited; the run was too short to tell"
        waited = 100 * self.idle[stage.who]
        return (
            f"{stage.stage} ({100 * stage.share:.0f} % of the time of the {stage.who}, which "
            f"waited {waited:.0f} %): {ADVICE[stage.stage]}"
        )

    def to_json(self) -> Json:
        return {
            "n_clips": self.n_clips,
            "elapsed_s": self.elapsed_s,
            "clips_per_s": self.n_clips / self.elapsed_s if self.elapsed_s else None,
            "peak_rss_bytes": self.peak_bytes,
            "stages": {
                stage.stage: {
                    "who": stage.who,
                    "n_threads": stage.n_threads,
                    "busy_s": stage.busy_s,
                    "share": stage.share,
                    "clips_per_s": stage.clips_per_s,
                }
                for stage in self.stages
            },
            "idle": self.idle,
            "fix_next": self.fix_next.stage if self.fix_next else None,
            "advice": self.advice,
        }

    def lines(self) -> list[str]:
        """A table for people, 80 columns wide at most but for the advice."""
        if not self.n_clips:
            return ["no profile: nothing was encoded by this run"]
        rate = self.n_clips / self.elapsed_s if self.elapsed_s else 0.0
        lines = [
            f"{self.n_clips} clips in {self.elapsed_s:.1f} s, {rate:.1f} clips/s, "
            f"{human_bytes(self.peak_bytes)} at most in a worker",
            f"{'stage':<11}{'who':<16}{'threads':>7}{'busy s':>9}{'share':>7}{'clips/s alone':>16}",
        ]
        for stage in self.stages:
            alone = "" if stage.clips_per_s is None else f"{stage.clips_per_s:.0f}"
            lines.append(
                f"{stage.stage:<11}{stage.who:<16}{stage.n_threads:>7.3g}{stage.busy_s:>9.1f}"
                f"{100 * stage.share:>6.0f}%{alone:>16}"
            )
        waited = ", ".join(f"{who} {100 * share:.0f} %" for who, share in self.idle.items())
        return [*lines, f"waited: {waited}", f"fix next: {self.advice}"]


def profile_of(reports: Iterable[ShardReport]) -> Profile:
    """The profile of a run, from the reports of its shards."""
    reports = [report for report in reports if report.times.threads]
    busy_s: dict[str, float] = {}
    thread_s: dict[str, float] = {}
    for times in (report.times for report in reports):
        span_s = times.ended_s - times.began_s
        for stage, seconds in times.busy_s.items():
            busy_s[stage] = busy_s.get(stage, 0.0) + seconds
        for who, n_threads in times.threads.items():
            thread_s[who] = thread_s.get(who, 0.0) + n_threads * span_s
    began_s = min((report.times.began_s for report in reports), default=0.0)
    elapsed_s = max((report.times.ended_s for report in reports), default=0.0) - began_s
    n_clips = sum(report.n_done + report.n_failed for report in reports)
    stages = (
        _share(stage, busy_s[stage], thread_s[STAGES[stage]], elapsed_s, n_clips)
        for stage in STAGES
        if stage in busy_s
    )
    peak_bytes = max((report.times.peak_bytes for report in reports), default=0)
    return Profile(n_clips, elapsed_s, peak_bytes, tuple(stages))


def write_profile(bank: Path, profile: Profile) -> Path:
    """Leaves the profile of the last run as notes/profile.json of a bank, which no seal covers."""
    path = bank / "notes/profile.json"
    write_durably(path, json.dumps(profile.to_json(), indent=1).encode())
    return path


def _share(
    stage: str, busy_s: float, thread_s: float, elapsed_s: float, n_clips: int
) -> StageShare:
    n_threads = thread_s / elapsed_s if elapsed_s else 0.0
    return StageShare(
        stage=stage,
        who=STAGES[stage],
        n_threads=n_threads,
        busy_s=busy_s,
        share=busy_s / thread_s if thread_s else 0.0,
        clips_per_s=n_clips * n_threads / busy_s if busy_s > 0 else None,
    )
