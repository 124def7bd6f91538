"""Banks at real servers, trained from as if they were here: S3, SFTP, plain HTTP."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_loader_processes import in_child
from test_remote_bank import assert_same_batches

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.identity import root_hash
from patchbank.pipeline.errors import BankCorrupt, BankError
from patchbank.pipeline.sharing.push import push_bank
from patchbank.pipeline.sharing.stores import open_store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATCHBANK_SETTINGS", str(tmp_path / "no-settings.toml"))
    return tmp_path / "cache"


@pytest.fixture(params=["s3", "sftp", "http"])
def address(request: pytest.FixtureRequest, sealed: Bank) -> str:
    """Where a copy of the bank lies."""
    if request.param == "http":
        url, folder = request.getfixturevalue("http_folder")
        shutil.copytree(sealed.path, folder / "x.bank")
        return f"{url}/x.bank"
    place = request.getfixturevalue({"s3": "s3_bucket", "sftp": "sftp_folder"}[request.param])
    push_bank(sealed.path, open_store(f"{place}/x.bank"))
    return f"{place}/x.bank"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_batches_come_from_a_server_in_threads_and_processes(sealed: Bank, address: str) -> None:
    remote = open_bank(address)
    assert remote.where == address
    assert_same_batches(remote, sealed, n_epochs=2, tier="read")
    found = np.asarray(pickle.loads(pickle.dumps(remote)).rows_view(1))
    np.testing.assert_array_equal(found, np.asarray(sealed.rows_view(1)))
    shutil.rmtree(remote.path)  # so that the fork has to ask the server, too
    in_child(lambda: assert_same_batches(remote, sealed, tier="ram"))


@pytest.mark.slow
def test_training_from_a_bucket_gives_the_weights_of_the_bank_itself(
    sealed: Bank, s3_bucket: str, clip_table: Path, tmp_path: Path
) -> None:
    push_bank(sealed.path, open_store(f"{s3_bucket}/x.bank"))
    quick = ["--probe", "linear", "--epochs", "1", "--seeds", "1", "--lr", "0.01"]
    for bank, name in ((f"{s3_bucket}/x.bank", "afar"), (str(sealed.path), "here")):
        labels = f"--labels={clip_table.parent / 'labels.csv'}"
        out = ["--device", "cpu", "--out", str(tmp_path / name)]
        assert main(["train-probe", bank, labels, *quick, *out]) == 0
    weights = [(tmp_path / name / "linear/probe.safetensors") for name in ("afar", "here")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_seal_that_a_server_without_listings_cannot_keep_takes_no_memory(
    sealed: Bank, http_folder: tuple[str, Path]
) -> None:
    pytest.importorskip("patchbank.pipeline.sharing.http_store")
    url, folder = http_folder
    bank = Path(shutil.copytree(sealed.path, folder / "x.bank"))
    seal = json.loads((bank / "seal.json").read_bytes())
    [shard] = [file for file in seal["files"] if file["path"] == "layers/1/patches/c.1.0.0"]
    shard["size"] = 2**50
    seal["root_sha256"] = root_hash(seal)
    (bank / "seal.json").write_text(json.dumps(seal))
    with pytest.raises(BankCorrupt, match=r"c\.1\.0\.0 is sealed with 1125899906842624 bytes, the"):
        open_bank(f"{url}/x.bank")
    [golden] = [file for file in seal["files"] if file["path"] == "golden/frames/c.0.0"]
    shard["size"], golden["size"] = sealed.seal.files[shard["path"]].size, 2**50
    seal["root_sha256"] = root_hash(seal)
    (bank / "seal.json").write_text(json.dumps(seal))
    with pytest.raises(BankCorrupt, match=r"frames/c\.0\.0 has \d+ bytes, sealed 1125899906842624"):
        open_bank(f"{url}/x.bank")


def test_a_bank_that_has_to_be_signed_is_not_opened_without(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, allowed = tmp_path / "alice", tmp_path / "allowed"
    line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)]
    subprocess.run(line, check=True)
    allowed.write_text(f"alice@lab {key.with_suffix('.pub').read_text()}")
    monkeypatch.setenv("PATCHBANK_ALLOWED_SIGNERS", str(allowed))
    monkeypatch.setenv("PATCHBANK_REQUIRE_SIGNATURE", "pull")
    with pytest.raises(BankError, match=f"{copy} is not signed"):
        open_bank(f"file://{copy}")
    open_bank(copy)
    assert main(["bank", "sign", str(copy), "--key", str(key)]) == 0
    assert open_bank(f"file://{copy}").signed_by == ("alice@lab",)  # type: ignore[attr-defined]
