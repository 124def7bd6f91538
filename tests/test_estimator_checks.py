"""scikit-learn's own checks of an estimator, on arrays (clip, dim)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

FEW = {"n_epochs": 6, "batch_size": 32, "device": "cpu"}
PARAMETERS: dict[str, dict[str, Any]] = {
    # Searches the learning rate.
    "linear": {"n_candidates": 2},
    "protobin": {"learning_rate": 0.08},
    "knn": {},
}
SLOWER: dict[str, dict[str, Any]] = {
    "mhca": {"learning_rate": 0.1},
    # As wide as the data by default, which are two numbers in these checks.
    "mlp": {"learning_rate": 0.1, "options": {"hidden": 16}},
    "linpre": {"learning_rate": 0.1},
    "conv": {"learning_rate": 0.03},
    "ep": {"learning_rate": 0.1},
    "simpool": {"learning_rate": 0.1},
    "abmilp": {"learning_rate": 0.1},
    "proto": {"learning_rate": 0.08},
    "protofloat": {"learning_rate": 0.08},
    "cgp": {"learning_rate": 0.03, "options": {"n_prototypes": 50}},
}
EXPECTED_FAILED_CHECKS: dict[str, dict[str, str]] = {
    "simpool": {
        "check_classifiers_train": "layer norm leaves two features their order, too little for 83 %"
    },
}
"""By probe, with the reason; docs/scikit-learn.md has the same table."""

# Without the type checker of the test run: it refuses the parameters that one check sets, of any
# type, before fit can.
CHECK = """
import json, sys, warnings
import torch
from sklearn.utils.estimator_checks import check_estimator
from patchbank.probing import ProbeClassifier

warnings.simplefilter("ignore")  # some checks are made to warn
torch.set_num_threads(1)
found = {}
for probe, parameters in json.load(sys.stdin).items():
    results = check_estimator(ProbeClassifier(probe, **parameters), on_fail=None, on_skip=None)
    assert sum(one["status"] != "skipped" for one in results) > 50
    found[probe] = [one["check_name"] for one in results if one["status"] == "failed"]
print(json.dumps(found))
"""


def failed_checks(parameters: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    """Names of the checks that each probe does not pass, with these parameters."""
    given = json.dumps({probe: FEW | one for probe, one in parameters.items()})
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        input=given,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {probe: set(names) for probe, names in json.loads(done.stdout).items()}


def expected(probes: dict[str, Any]) -> dict[str, set[str]]:
    return {probe: set(EXPECTED_FAILED_CHECKS.get(probe, {})) for probe in probes}


def test_probes_fail_no_check_but_those_that_are_argued() -> None:
    assert failed_checks(PARAMETERS) == expected(PARAMETERS)


@pytest.mark.slow
def test_other_probes_fail_no_check_but_those_that_are_argued() -> None:
    assert failed_checks(SLOWER) == expected(SLOWER)
