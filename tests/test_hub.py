"""Weights from the hub: pinned to a commit, cached, and nothing but weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, serving
from published_files import beats, eat_folder

from patchbank.pipeline import load_encoder
from patchbank.pipeline.encoders.hub import locate_weights
from patchbank.pipeline.errors import EncoderError

REPO = "worstchan/EAT-small"
FIRST, SECOND = "1" * 40, "2" * 40


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does before huggingface_hub is imported."""
    from huggingface_hub import constants

    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """With one commit of a small EAT, and code that must never be fetched."""
    from huggingface_hub import constants

    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    for name in (*proxies, "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    place = eat_folder(tmp_path)
    (place / "modeling_eat.py").write_text("raise SystemExit('executed')")
    with serving() as hub:
        hub.add(REPO, place, commit=FIRST)
        point_at(hub.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def test_a_branch_is_pinned_to_its_commit_and_recorded(hub: FakeHub, tmp_path: Path) -> None:
    encoder = load_encoder("eat", weights=f"hf:{REPO}")
    assert encoder.spec.source == f"hf:{REPO}@{FIRST}"
    local = load_encoder("eat", weights=tmp_path / "eat")
    assert encoder.spec.encoder_id == local.spec.encoder_id
    assert sorted(hub.fetched) == [
        f"{REPO}@{FIRST}:{n}" for n in ("config.json", "model.safetensors")
    ]
    # From the cache, also by the commit.
    again = load_encoder("eat", weights=encoder.spec.source)
    assert again.spec == encoder.spec
    assert len(hub.fetched) == 2


def test_a_branch_that_moved_gives_its_new_commit(hub: FakeHub, tmp_path: Path) -> None:
    first = locate_weights(f"hf:{REPO}@main")
    (tmp_path / "new").mkdir()
    hub.add(REPO, eat_folder(tmp_path / "new"), commit=SECOND)
    second = locate_weights(f"hf:{REPO}@main")
    assert (first.reference, second.reference) == (f"hf:{REPO}@{FIRST}", f"hf:{REPO}@{SECOND}")
    assert locate_weights(first.reference).path == first.path


def test_a_file_of_another_name_is_named(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    beats(tmp_path / "mirror")
    hub.add("someone/beats", tmp_path / "mirror", commit=SECOND)
    with pytest.raises(EncoderError, match=r"name the file: hf:someone/beats@main:FILE"):
        load_encoder("beats", weights="hf:someone/beats")
    encoder = load_encoder("beats", weights="hf:someone/beats:beats.pt")
    assert encoder.spec.source == f"hf:someone/beats@{SECOND}:beats.pt"
    with pytest.raises(EncoderError, match=r"has no nothing\.pt, nor has .*; name the file"):
        load_encoder("beats", weights="hf:someone/beats:nothing.pt")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf:nobody/nothing", "no repository nobody/nothing that you may read"),
        (f"hf:{REPO}@elsewhere", f"{REPO} has no revision elsewhere"),
        ("hf:eat", "cannot read the reference hf:eat; expected hf:org/repo"),
        (f"hf:{REPO}:../../etc/passwd", "cannot read the reference"),
        ("hf:a/b/c", "cannot read the reference"),
    ],
)
def test_what_is_not_there_is_said(hub: FakeHub, reference: str, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        load_encoder("eat", weights=reference)


def test_without_a_hub_the_cache_is_used(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = locate_weights(f"hf:{REPO}")
    point_at("http://127.0.0.1:9", monkeypatch)
    assert locate_weights(f"hf:{REPO}") == before
    with pytest.raises(EncoderError, match=r"cannot be asked .*give a local file"):
        locate_weights("hf:worstchan/other")


def test_offline_mode_is_respected(hub: FakeHub, tmp_path: Path) -> None:
    program = (
        "from patchbank.pipeline.encoders.hub import locate_weights\n"
        "from patchbank.pipeline.errors import EncoderError\n"
        f"try: print(locate_weights('hf:{REPO}').reference)\n"
        "except EncoderError as error: print(error)\n"
    )

    def run(**environment: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(tmp_path / "home"),
                **environment,
            },
        ).stdout.strip()

    assert "HF_HUB_OFFLINE); fetch it where there is a network" in run(HF_HUB_OFFLINE="1")
    assert hub.fetched == []
    assert run() == f"hf:{REPO}@{FIRST}"
    assert run(HF_HUB_OFFLINE="1") == f"hf:{REPO}@{FIRST}"
