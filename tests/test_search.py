"""The search: rounds, halving, what Optuna is told."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from needle_sets import needle_tokens
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from patchbank.pipeline.errors import TrialError
from patchbank.probing import train
from patchbank.probing.batch import ArraySource
from patchbank.probing.entries import Entry
from patchbank.probing.job import Job
from patchbank.probing.protocol import Outcome, train_job
from patchbank.probing.run_state import RunState
from patchbank.probing.search import Candidate, choose
from patchbank.probing.settings import Point, SearchSettings, TrainSettings
from patchbank.probing.splits import Split
from patchbank.probing.study import Task, course_of, study_of
from patchbank.probing.train_options import TrainOptions
from patchbank.probing.training import Event, Progress, Training, Validated
from patchbank.probing.trial_log import Ranges, TrialLog, open_storage

ROWS = np.arange(120)
SPLIT = Split("split", ROWS[:70], ROWS[70:95], ROWS[95:])
SEARCH = SearchSettings(
    n_candidates=7, first="sobol", n_rounds=2, n_a_round=4, halving_epochs=(1, 2)
)
SETTINGS = TrainSettings(
    n_epochs=3, n_seeds=2, batch_size=16, search=SEARCH, n_resamples=50, device="cpu"
)
Events = list[Event]


def run(probes: list[str | Entry], settings: TrainSettings = SETTINGS) -> tuple[Outcome, ...]:
    tokens, targets = needle_tokens(120)
    return train(
        ArraySource(tokens), targets, SPLIT, probes=probes, multi_label=True, settings=settings
    )


def test_rounds_are_trained_together_and_a_third_goes_on() -> None:
    tokens, targets = needle_tokens(120)
    events: Events = []
    [linear, knn] = train(
        ArraySource(tokens),
        targets,
        SPLIT,
        probes=["linear", "knn"],
        multi_label=True,
        settings=SETTINGS,
        progress=events.append,
    )
    n_trials = [
        (one.stage, one.epoch, len(one.losses["linear"]))
        for one in events
        if isinstance(one, Progress)
    ]
    assert n_trials == [
        *[("search 1/3", epoch, n) for epoch, n in ((1, 7), (2, 3), (3, 1))],
        *[(f"search {k}/3", epoch, n) for k in (2, 3) for epoch, n in ((1, 4), (2, 2), (3, 1))],
        *[("final", epoch, 2) for epoch in (1, 2, 3)],
    ]
    assert Counter(one.round for one in linear.candidates) == {0: 7, 1: 4, 2: 4}
    assert Counter(one.epochs for one in linear.candidates) == {1: 4 + 2 + 2, 2: 2 + 1 + 1, None: 3}
    assert knn.candidates == (Candidate(0.0, 0.0, None),)


def test_those_that_go_on_are_the_best_and_the_best_of_all_that_end_is_chosen() -> None:
    [outcome] = run(["linear"])
    of_round = [one for one in outcome.candidates if one.round == 0]
    assert all(one.score is not None for one in of_round)
    [end] = [one for one in of_round if one.epochs is None]
    left = [one.score or 0.0 for one in of_round if one.epochs == 1]
    events = judged_events(["linear"])
    first, second, third = [one.values["linear"] for one in events if one.stage == "search 1/3"]
    kept = sorted((pair.value for pair in first), reverse=True)[:3]
    assert sorted(value for value in left) == sorted(pair.value for pair in first)[:4]
    assert {pair.trial for pair in second} == {p.trial for p in first if p.value in kept}
    assert third[0].trial == max(second, key=lambda pair: pair.value).trial
    assert third[0].value == end.score
    ends = [one for one in outcome.candidates if one.epochs is None]
    best = max(ends, key=lambda one: one.score or 0.0)
    assert outcome.trials[0].learning_rate == best.learning_rate
    assert outcome.trials[0].weight_decay == best.weight_decay


def judged_events(probes: list[str | Entry]) -> list[Validated]:
    tokens, targets = needle_tokens(120)
    events: Events = []
    train(
        ArraySource(tokens),
        targets,
        SPLIT,
        probes=probes,
        multi_label=True,
        settings=SETTINGS,
        progress=events.append,
    )
    return [one for one in events if isinstance(one, Validated)]


def test_a_search_repeats_and_other_probes_change_nothing_of_it() -> None:
    [alone] = run(["mhca"])
    _, beside = run(["linear", "mhca"])
    assert alone.candidates == beside.candidates
    [other] = run(["mhca"], replace(SETTINGS, search=replace(SEARCH, seed=1)))
    assert alone.candidates != other.candidates


@pytest.mark.parametrize("name", ["linear", "mlp", "ep", "cgp", "linear:dropout"])
def test_a_trial_that_goes_on_alone_ends_as_if_it_had_company(name: str) -> None:
    tokens, targets = needle_tokens(60)
    family, _, option = name.partition(":")
    entry = Entry(name, family, {"dropout": 0.3, "layer_norm": True} if option else {})
    settings = replace(SETTINGS, dtype="float64")
    source = ArraySource(tokens)
    task = Task(targets, Split("split", ROWS[:40], ROWS[40:50], ROWS[50:60]), True)
    study = study_of(source, task, entry)
    points = [Point(rate, 1e-4) for rate in (1e-3, 3e-3, 5e-3, 1e-2)]

    def trained(kept: list[int]) -> Training:
        courses = [course_of(study, settings, points=points, seeds=[0, 1, 2, 3])]
        training = Training(courses, source, settings=settings)
        training.run(until=1)
        training.keep([kept])
        training.run()
        return training

    whole, part = trained([0, 1, 2, 3]), trained([1, 3])
    assert part.courses[0].stack.kept == (1, 3)
    for index, place in enumerate((1, 3)):
        found = part.courses[0].stack.weights_of(index)
        for key, expected in whole.courses[0].stack.weights_of(place).items():
            torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-12)


def test_sobols_points_fill_both_ranges() -> None:
    settings = TrainSettings(search=SearchSettings(n_candidates=25, first="sobol"))
    points = settings.candidates("linear", (1e-4, 7e-3))
    assert len(set(points)) == 25
    assert points == settings.candidates("linear", (1e-4, 7e-3))
    assert points != settings.candidates("mhca", (1e-4, 7e-3))
    for values, (lowest, highest) in zip(
        zip(*points, strict=True), ((1e-4, 7e-3), (1e-5, 5e-4)), strict=True
    ):
        places = np.log(np.array(values) / lowest) / np.log(highest / lowest)
        # One in every sixteenth, as only a sequence of low discrepancy has them.
        assert set(np.floor(places * 16).clip(0, 15)) == set(range(16))


def test_values_that_are_given_are_all_that_is_tried() -> None:
    given = replace(SETTINGS, learning_rates={"linear": (1e-3, 1e-2)}, weight_decays={})
    [outcome] = run(["linear"], given)
    assert [(one.learning_rate, one.weight_decay) for one in outcome.candidates] == [
        (1e-3, 1e-4),
        (1e-2, 1e-4),
    ]
    none = replace(given, weight_decays={"linear": (0.0,)})
    assert {one.weight_decay for one in run(["linear"], none)[0].candidates} == {0.0}


def test_one_point_first_and_suggestions_after_it() -> None:
    settings = replace(SETTINGS, search=replace(SEARCH, n_candidates=1))
    [outcome] = run(["linear"], settings)
    assert Counter(one.round for one in outcome.candidates) == {0: 1, 1: 4, 2: 4}


def test_ranges_are_those_of_the_probe_then_of_its_family_then_its_own() -> None:
    search = replace(
        SEARCH, n_rounds=0, learning_rates={"linear": (2e-3, 3e-3), "mine": (5e-3, 6e-3)}
    )
    entries: list[str | Entry] = [Entry("other", "linear"), Entry("mine", "linear"), "mhca"]
    ranges = [(2e-3, 3e-3), (5e-3, 6e-3), (1e-4, 7e-3)]
    for outcome, (lowest, highest) in zip(
        run(entries, replace(SETTINGS, search=search)), ranges, strict=True
    ):
        rates = [one.learning_rate for one in outcome.candidates]
        assert lowest <= min(rates) < max(rates) <= highest


def test_what_diverges_is_told_as_such_and_never_chosen() -> None:
    search = replace(SEARCH, learning_rates={"linear": (1e-3, 1e38)}, n_candidates=8)
    [outcome] = run(["linear"], replace(SETTINGS, search=search))
    diverged = [one for one in outcome.candidates if one.score == -np.inf]
    assert diverged
    assert len(diverged) < len(outcome.candidates)
    assert outcome.trials[0].learning_rate < min(one.learning_rate for one in diverged)


def test_what_diverges_late_does_not_draw_the_search_near() -> None:
    log = TrialLog("split/x", Ranges((1e-4, 7e-3), (1e-5, 5e-4)), open_storage(None), seed=0)
    points = log.ask(0, points=[Point(float(rate), 1e-4) for rate in np.geomspace(1e-4, 7e-3, 25)])
    values = [
        {3: rate, 30: -np.inf if rate > 4e-3 else rate} if rate > 1e-3 else {3: rate}
        for rate, _ in points
    ]
    log.tell(0, values, n_epochs=30)
    diverged = [one for one in log.tried if one.diverged_after is not None]
    assert [one.diverged_after for one in diverged] == [3] * sum(rate > 4e-3 for rate, _ in points)
    assert all(not one.values for one in diverged)
    suggested = np.array(
        [point.learning_rate for number in (1, 2) for point in log.ask(number, n=5)]
    )
    assert np.median(suggested) < 4e-3


def test_a_probe_that_remembers_sees_every_clip_where_others_learn_from_some() -> None:
    settings = replace(SETTINGS, n_steps=2, search=SearchSettings(n_candidates=1))
    [alone] = run(["knn"], settings)
    _, beside = run(["linear", "knn"], settings)
    assert beside.weights[0]["vectors"].shape == (70, 24)
    assert np.array_equal(alone.test_scores, beside.test_scores)
    [linear] = run(["linear"], settings)
    assert np.array_equal(linear.test_scores, run(["linear", "knn"], settings)[0].test_scores)


def test_a_warm_up_that_never_ends_is_refused() -> None:
    with pytest.raises(TrialError, match="found warmup_steps=500 of 15 steps in all"):
        run(["linear"], replace(SETTINGS, n_warmup_steps=500))


def test_settings_that_mean_nothing_are_told() -> None:
    tokens, targets = needle_tokens(120)
    given = replace(SETTINGS, learning_rates={"linear": (1e-3,), "knn": (1e-3,)})
    said: list[str] = []
    job = Job(ArraySource(tokens), given, say=said.append)
    train_job(job, [Task(targets, SPLIT, True)], ["linear", "knn"])
    assert said == [
        "linear: the values that are given are all that is tried, in one round",
        "knn: learns nothing, so learning rate and weight decay are not used",
    ]


def test_a_damaged_journal_says_what_to_do(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    journal.write_text("{\n{}\n")
    with pytest.raises(TrialError, match=r"cannot read .*search\.journal .*remove that file"):
        open_storage(journal)


def test_a_setting_that_was_left_behind_is_not_chosen() -> None:
    tried = [Candidate(0.1, 0, 0.9, epochs=3), Candidate(0.2, 0, 0.5), Candidate(0.3, 0, 0.4)]
    assert choose("linear", tried) == (0.2, 0)
    ended = [tried[0], Candidate(0.4, 0, -np.inf, epochs=2), Candidate(0.5, 0, -np.inf, epochs=3)]
    with pytest.raises(TrialError, match=r"trained to the end diverged \(tried 0\.4, 0\.5\)"):
        choose("linear", ended)


def test_optuna_reads_the_journal_that_a_run_leaves(tmp_path: Path) -> None:
    tokens, targets = needle_tokens(120)
    job = Job(ArraySource(tokens), SETTINGS, state=RunState(tmp_path))
    [[outcome]] = train_job(job, [Task(targets, SPLIT, True)], ["linear"])
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "search.journal")))
    study = optuna.load_study(study_name="split/linear", storage=storage)
    assert Counter(trial.state for trial in study.trials) == {
        TrialState.COMPLETE: 3,
        TrialState.PRUNED: 12,
    }
    assert study.best_params["learning_rate"] == outcome.trials[0].learning_rate
    assert study.best_value == max(
        one.score for one in outcome.candidates if one.epochs is None and one.score is not None
    )


def test_suggestions_go_where_the_values_are_high() -> None:
    log = TrialLog("split/x", Ranges((1e-4, 1e-1), (1e-5, 5e-4)), open_storage(None), seed=0)
    points = [Point(float(rate), 1e-4) for rate in np.geomspace(1e-4, 1e-1, 25)]
    suggested: list[float] = []
    for number in range(6):
        asked = log.ask(number, points=points if number == 0 else (), n=5)
        log.tell(number, [{1: -abs(np.log10(rate / 1e-2))} for rate, _ in asked], n_epochs=1)
        suggested += [point.learning_rate for point in asked if number > 0]
    assert len(set(suggested)) == 25
    # Three quarters of a decade are what chance would give.
    assert np.median(np.abs(np.log10(np.array(suggested) / 1e-2))) < 0.5


def test_a_round_that_was_asked_for_is_the_same_again_and_told_once(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"

    def log() -> TrialLog:
        ranges = Ranges((1e-4, 1e-1), (1e-5, 5e-4))
        return TrialLog("split/x", ranges, open_storage(journal), seed=3)

    first = log().ask(0, points=[Point(1e-3, 1e-4), Point(1e-2, 1e-4)])
    log().tell(0, [{1: 0.25, 2: 0.5}, {1: 0.125}], n_epochs=2)
    log().tell(0, [{1: 0.0, 2: 0.0}, {1: 0.0}], n_epochs=2)
    assert [one.values for one in log().tried] == [{1: 0.25, 2: 0.5}, {1: 0.125}]
    assert [one.is_complete for one in log().tried] == [True, False]
    assert log().ask(0, points=[Point(5e-3, 1e-4)]) == first
    assert log().ask(1, n=3) == log().ask(1, n=3)
    assert not log().is_told(1)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_a_journal_that_a_kill_cut_short_asks_for_the_same(tmp_path: Path, share: float) -> None:
    journal = tmp_path / "search.journal"
    points = [Point(float(rate), 1e-4) for rate in np.geomspace(1e-3, 1e-2, 6)]
    ranges = Ranges((1e-4, 1e-1), (1e-5, 5e-4))
    TrialLog("split/x", ranges, open_storage(journal), seed=3).ask(0, points=points)
    whole = journal.read_bytes()
    journal.write_bytes(whole[: int(len(whole) * share)])
    (tmp_path / "search.journal.lock").symlink_to(journal)
    again = TrialLog("split/x", ranges, open_storage(journal), seed=3)
    assert again.ask(0, points=points) == points


WRONG_SEARCHES = {
    "halving": ({"halving_epochs": (10, 3)}, r"halving_epochs=\[10, 3\], expected ascending"),
    "share": ({"keep": 0.0}, "found keep=0, expected a share above 0"),
    "range": ({"weight_decays": (0.0, 1.0)}, "weight_decays from 0 to 1, expected a range above 0"),
    "turned": (
        {"learning_rates": {"linear": (1.0, 0.1)}},
        "learning_rates of linear from 1 to 0.1, expected a range",
    ),
    "rounds": ({"n_rounds": -1}, "found n_rounds=-1, expected at least 0"),
}


@pytest.mark.parametrize(("given", "message"), WRONG_SEARCHES.values(), ids=WRONG_SEARCHES)
def test_a_search_that_cannot_be_says_why(given: dict[str, object], message: str) -> None:
    with pytest.raises(TrialError, match=message):
        SearchSettings(**given)  # type: ignore[arg-type]


def test_the_preset_unmute_is_the_papers_protocol() -> None:
    options = TrainOptions.resolve({"probe": ["linear", "protobin"]}, preset="unmute")
    settings = options.settings([12])
    search = settings.search
    assert (settings.n_epochs, settings.batch_size, settings.n_seeds) == (30, 128, 5)
    assert (search.n_candidates, search.first) == (25, "sobol")
    assert search.n_candidates + search.n_rounds * search.n_a_round == 50
    assert (search.halving_epochs, search.keep) == ((3, 10), 1 / 3)
    assert search.weight_decays == (1e-5, 5e-4)
    assert search.learning_rates["linear"] == (1e-4, 7e-3)
    assert search.learning_rates["protobin"] == (2e-3, 8e-2)


def test_the_preset_bat_is_a_fixed_recipe() -> None:
    options = TrainOptions.resolve({"probe": ["linear", "cgp:dropout=0.5"]}, preset="bat")
    settings = options.settings([12])
    assert settings.candidates("linear", (1e-4, 1e-3)) == (Point(1e-3, 0.05),)
    assert (settings.n_steps, settings.batch_size, settings.n_warmup_steps) == (20_000, 48, 500)
    assert settings.lowest_rate * 1e-3 == pytest.approx(1e-6)
    linear, cgp = options.entries([12])[0]
    assert linear == Entry("linear", "linear", {"layer_norm": True, "dropout": 0.2})
    assert cgp.options == {"dropout": 0.5}


def test_steps_end_an_epoch_early_and_the_cosine_with_it() -> None:
    tokens, targets = needle_tokens(120)
    events: Events = []
    settings = replace(SETTINGS, n_steps=7, learning_rates={"linear": (1e-2,)})
    source = ArraySource(tokens)
    task = Task(targets, SPLIT, True)
    study = study_of(source, task, Entry.of("linear"))
    course = course_of(study, settings, points=[Point(1e-2, 0.0)], seeds=[0])
    training = Training([course], source, settings=settings, progress=events.append)
    assert (training.n_epochs, training.n_steps) == (2, 7)
    training.run()
    assert training.n_steps_done == 7
    assert [one.epoch for one in events if isinstance(one, Progress)] == [1, 2]
