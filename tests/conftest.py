"""Shared fixtures: real material where it is at hand, small synthetic audio everywhere."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from audio_sets import write_clip_set
from fake_packages import Install
from servers import (  # noqa: F401
    gs_bucket,
    gs_server,
    home,
    http_folder,
    make_bucket,
    nginx,
    s3_bucket,
    s3_keys,
    s3_server,
    sftp_folder,
    ssh_home,
    ssh_server,
)

# patchbank itself is imported in the fixtures: shapes are only checked in modules that are loaded
# after the configuration, which comes after this file.
if TYPE_CHECKING:
    from patchbank.pipeline.bank import Bank

SHARED = Path(os.environ.get("PATCHBANK_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    """Only tests that ask for a GPU see one: `pytest -m gpu`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell lets what it starts in the background ignore Ctrl-C, and all that this starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Nobody's own settings decide what a test sees.
    os.environ["PATCHBANK_SETTINGS"] = os.devnull
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Processes that share the cores do their sums alone, and so do those that they begin.
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nobody's own cache of rows is read or filled, by commands that tests start neither."""
    os.environ["PATCHBANK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real audio, weights and goldens; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs real audio and weights: no folder {SHARED} (set PATCHBANK_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def clip_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fake_bank import N_CLIPS

    return write_clip_set(tmp_path_factory.mktemp("set"), n_clips=N_CLIPS)


@pytest.fixture(scope="session")
def sealed(clip_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    from fake_bank import SETTINGS

    from patchbank.pipeline.extraction import extract

    out = tmp_path_factory.mktemp("banks") / "fake.bank"
    return extract(clip_table, encoder="fake", out=out, settings=SETTINGS)


@pytest.fixture(scope="session")
def made(clip_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Of the same table, with two views of each training clip."""
    from made_views import MADE

    from patchbank.pipeline.extraction import extract

    out = tmp_path_factory.mktemp("banks") / "made.bank"
    return extract(clip_table, encoder="fake", out=out, settings=MADE)


@pytest.fixture
def copy(sealed: Bank, tmp_path: Path) -> Path:
    """A sealed bank that a test may damage."""
    return Path(shutil.copytree(sealed.path, tmp_path / "copy.bank"))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lays packages with entry points onto the path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return Install(folder)
