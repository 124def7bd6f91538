"""`patchbank bank push` and `bank pull`, as typed."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from patchbank.cli.choices import StoredDType
from patchbank.cli.main import main
from patchbank.cli.pull import Part, destination
from patchbank.cli.share import Claims, _enter, place_in
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import PatchbankError, StoreError
from patchbank.pipeline.sharing.settings import load_settings
from patchbank.pipeline.sharing.stores import CLIENTS, split_place


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHBANK_SETTINGS", str(tmp_path / "settings.toml"))
    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "cache"))
    # `--allowed-signers` sets these for the rest of a process.
    monkeypatch.setenv("PATCHBANK_ALLOWED_SIGNERS", "")
    monkeypatch.setenv("PATCHBANK_REQUIRE_SIGNATURE", "")


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("s3://team/banks", "s3://team/banks/x.bank"),
        ("s3://team/banks/", "s3://team/banks/x.bank"),
        ("s3://team/banks/y.bank", "s3://team/banks/y.bank"),
        ("s3://team/banks/y.bank/", "s3://team/banks/y.bank"),
        ("/mnt/share", "/mnt/share/x.bank"),
        ("/", "/x.bank"),
        ("file:///", "file:///x.bank"),
        ("s3://bucket", "s3://bucket/x.bank"),
        ("~/banks", str(Path.home() / "banks/x.bank")),
    ],
)
def test_a_push_goes_to_the_address_of_a_bank_or_below_that_of_a_folder(
    url: str, place: str
) -> None:
    assert place_in(url, "x.bank") == place


@pytest.mark.parametrize(
    ("dest", "out"),
    [(None, "x.bank"), ("y.bank", "y.bank"), ("banks", "banks/x.bank"), ("b/", "b/x.bank")],
)
def test_a_pull_goes_to_the_bank_that_is_named_or_below_the_folder(
    dest: str | None, out: str
) -> None:
    assert destination(dest, "x.bank") == Path(out)


def test_push_ls_pull_by_hand(
    sealed: Bank,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    team = str(tmp_path / "team")
    line = ["bank", "push", str(sealed.path), team, "--data", "tones"]
    assert main([*line, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == sealed.seal.bank_bytes
    assert not Path(team).exists()
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert f"team/{sealed.path.name}: " in out
    assert "sent" in out
    assert "note: " in err  # the fake encoder's weights have no licence
    assert main(line) == 0
    assert "is there already" in capsys.readouterr().out
    assert main(["bank", "ls", team, "--data", "tones", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "tones" in json.dumps(listed)
    name = sealed.path.stem
    assert main(["bank", "pull", name, "--from", team, "--json"]) == 0
    pulled = json.loads(capsys.readouterr().out)
    assert pulled["root_sha256"] == sealed.root_sha256
    assert verify_bank(tmp_path / sealed.path.name) == ()
    assert main(["bank", "pull", name, "--from", team]) == 0
    assert "is here already" in capsys.readouterr().out


def test_a_part_is_pulled_by_its_options(
    sealed: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "part.bank"
    line = ["bank", "pull", f"file://{sealed.path}", str(out), "--split", "train", "--json"]
    assert main([*line, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert 0 < planned["bytes"] < sealed.seal.bank_bytes
    assert not out.exists()
    assert main(line) == 0
    made = open_bank(out)
    assert set(made.clips["split"].to_pylist()) == {"train"}
    assert made.card["derived_from"][0]["root_sha256"] == sealed.root_sha256


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["push", "{sealed}", "ftp://a/b"], "no store ftp://"),
        (["push", "{sealed}", "team", "--limit-rate", "fast"], "'fast' is no size"),
        (["push", "{sealed}", "team", "--limit-rate", "0"], "--limit-rate 0 is less than 1 kB"),
        (["pull", "{sealed}", "--limit-rate", "0.5"], "--limit-rate 0.5 is less than 1 kB"),
        (["push", "{sealed}", "s3://"], "s3:// names no bucket or host, expected s3://team/banks"),
        (["push", "{sealed}", "s3:///x.bank"], "names no bucket or host"),
        (["push", "{sealed}", "s3:/team/banks"], "write s3://team/banks, or ./s3:/team/banks if"),
        (["push", "{sealed}", "s3://x.bank"], "s3://x.bank is the root of its place"),
        (["push", "{sealed}", ""], "an empty place, expected a folder or an address"),
        (["push", "{sealed}", "~no-such-user/x"], "there is no such user"),
        (["pull", "{sealed}", "s3://team/x.bank"], "is no folder of this disk"),
        (["ls", ""], "an empty place"),
        (["verify", "s3:/team/x.bank"], "write s3://team/x.bank"),
        (["show", "s3:/team/x.bank"], "write s3://team/x.bank"),
        (["push", "team", "elsewhere"], "no bank at"),
        (["pull", "nowhere"], "no catalogue is set"),
        (["pull", "file:///nowhere/x.bank"], "no bank at"),
        (["pull", "{sealed}", "x.bank", "--split", "dev"], "no split 'dev'"),
        (["pull", "{sealed}", "x.bank", "--layers", "77"], "no layer 77"),
        (["pull", "{sealed}", "x.bank", "--allowed-signers", "none"], "no file none"),
    ],
)
def test_wrong_input_is_told_in_a_line(
    sealed: Bank,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = [argument.format(sealed=sealed.path) for argument in arguments]
    assert main(["bank", *line]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_unsigned_bank_is_refused_where_signers_are_asked_for(
    sealed: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signers = tmp_path / "signers"
    signers.write_text("")
    out = tmp_path / "here.bank"
    line = ["bank", "pull", str(sealed.path), str(out), "--allowed-signers", str(signers)]
    for more in ([], ["--pooled-only"], ["--layers", "last"]):
        assert main([*line, *more]) == 1
        assert "is not signed" in capsys.readouterr().err
        assert not out.exists()


def test_a_moved_bank_is_pushed_from_where_it_lies(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "elsewhere" / "moved.bank"
    moved.parent.mkdir()
    shutil.move(copy, moved)
    assert main(["bank", "push", str(moved), str(tmp_path / "team")]) == 0
    assert "moved.bank: " in capsys.readouterr().out


def test_a_word_is_a_name_where_there_is_a_catalogue_and_else_a_folder(
    sealed: Bank,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here, team = tmp_path / "here", tmp_path / "team"
    name = sealed.path.name
    half = here / name
    half.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert main(["bank", "push", str(sealed.path), str(team)]) == 0
    # A folder of that name is there before, as after a pull that was killed early.
    monkeypatch.setenv("PATCHBANK_CATALOGUE", "../team")
    for said in ("fetched", "is here already"):
        assert main(["bank", "pull", name]) == 0
        assert said in capsys.readouterr().out
    assert main(["bank", "pull", f"./{name}", "../copy/"]) == 0
    assert open_bank(tmp_path / "copy" / name).root_sha256 == sealed.root_sha256
    shutil.rmtree(team)
    assert main(["bank", "pull", name]) == 1
    assert "../team" in capsys.readouterr().err
    monkeypatch.delenv("PATCHBANK_CATALOGUE")
    assert main(["bank", "pull", name, "../other/"]) == 0
    for same in (name, f"./{name}"):
        capsys.readouterr()
        assert main(["bank", "pull", same]) == 1
        assert f"{name} is the place to pull from and to" in capsys.readouterr().err


def test_a_part_has_a_name_of_its_own() -> None:
    whole = Part("all", (), None, None, pooled_only=False)
    assert whole.name_of("mn04.bank") == "mn04.bank"
    part = Part("17", ("train",), None, None, pooled_only=False)
    assert part.name_of("mn04.bank") == "mn04.train.layers17.bank"
    part = Part("3,6", ("a", "../b"), Path("x/few.csv"), StoredDType.int8, pooled_only=True)
    assert part.name_of("mn04") == "mn04.a__b.layers3_6.few.pooled.int8.bank"


def test_a_part_goes_beside_the_whole_bank_and_not_onto_another(
    sealed: Bank,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"file://{sealed.path}"
    assert main(["bank", "pull", url]) == 0
    assert main(["bank", "pull", url, "--split", "train"]) == 0
    stem = sealed.path.stem
    assert {path.name for path in tmp_path.glob("*.bank")} == {f"{stem}.bank", f"{stem}.train.bank"}
    capsys.readouterr()
    assert main(["bank", "pull", url, "--split", "train"]) == 0
    out, err = capsys.readouterr()
    assert f"{stem}.train.bank: is here already" in out
    assert "of 0 B" not in err
    # Told before the table of clips is read.
    line = ["bank", "pull", url, f"{stem}.bank", "--clips", "nowhere.csv"]
    for more in ([], ["--dry-run"]):
        assert main([*line, *more]) == 1
        assert "holds another bank than a part of" in capsys.readouterr().err


def test_what_a_push_said_is_kept_by_the_next_one_that_says_nothing(
    sealed: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["bank", "push", str(sealed.path), str(tmp_path)]

    def told() -> tuple[str, str, list[str]]:
        capsys.readouterr()
        assert main(["bank", "ls", str(tmp_path), "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        return row["data"], row["data_licence"], row["signed_by"]

    assert main([*line, "--data", "esc50", "--data-licence", "CC-BY-NC-3.0"]) == 0
    _enter(sealed, str(tmp_path / sealed.path.name), Claims("esc50", "CC-BY-NC-3.0", ("ana",)))
    capsys.readouterr()
    assert main(line) == 0
    assert "licence of the recordings is not known" not in capsys.readouterr().err
    assert told() == ("esc50", "CC-BY-NC-3.0", ["ana"])
    assert "CC-BY-NC-3.0" in (tmp_path / sealed.path.name / "notes/README.md").read_text()
    assert main([*line, "--data", "another"]) == 0
    assert told() == ("another", "CC-BY-NC-3.0", ["ana"])


def test_a_bank_without_a_folder_above_is_pushed_and_not_entered(
    sealed: Bank, capsys: pytest.CaptureFixture[str]
) -> None:
    place = "hf://datasets/org/name.bank"
    assert split_place(place) == ("hf://datasets/org", "name.bank")
    _enter(sealed, place, Claims())
    err = capsys.readouterr().err
    assert "note: pushed, but not entered into the catalogue: hf://datasets/org names no" in err


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("s3://bucket/x.bank", ("s3://bucket", "x.bank")),
        ("file:///x.bank", ("file:///", "x.bank")),
        ("https://host/a/x.bank?key=1", ("https://host/a?key=1", "x.bank")),
        ("/x.bank", ("/", "x.bank")),
    ],
)
def test_a_place_is_a_folder_and_a_name(place: str, parts: tuple[str, str]) -> None:
    assert split_place(place) == parts


@pytest.mark.parametrize("place", ["s3://bucket", "s3://bucket/", "http://host", "file:///"])
def test_the_root_of_a_place_is_no_bank(place: str) -> None:
    with pytest.raises(StoreError, match=r"is the root of its place.*/NAME\.bank"):
        split_place(place)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("allowed_signers = true", "allowed_signers is True, expected the path of a file of keys"),
        ("cache = 5", "cache is 5, expected the path of a folder"),
        ("catalogue = 3", "catalogue is 3, expected an address or folder of banks"),
        ('catalogue = ""', "catalogue is '', expected an address or folder of banks"),
        ('cache_limit = "much"', "cache_limit is 'much', expected a size such as"),
        ("cache_limit = true", "cache_limit is True, expected a size such as"),
        ("require_signature = 1", "require_signature is 1, expected one of nothing, pull, open"),
        ('require_signature = "x"', "require_signature is 'x', expected one of nothing, pull"),
    ],
)
def test_a_setting_of_another_kind_is_named_with_its_file(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PATCHBANK_CACHE")
    (tmp_path / "settings.toml").write_text(line)
    with pytest.raises(PatchbankError) as caught:
        load_settings()
    assert str(caught.value).startswith(f"{tmp_path / 'settings.toml'}: {said}")
    monkeypatch.setenv("PATCHBANK_CACHE_LIMIT", "much")
    (tmp_path / "settings.toml").unlink()
    with pytest.raises(PatchbankError, match=r"^\$PATCHBANK_CACHE_LIMIT: cache_limit is 'much'"):
        load_settings()


def test_paths_of_the_settings_begin_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PATCHBANK_CACHE")
    (tmp_path / "settings.toml").write_text(
        'catalogue = "~/banks"\ncache = "~/c"\ncache_limit = 5000\nallowed_signers = "~/s"\n'
    )
    settings, home = load_settings(), Path.home()
    assert settings.catalogue == str(home / "banks")
    assert (settings.cache, settings.allowed_signers) == (home / "c", home / "s")
    assert settings.cache_limit_bytes == 5_000
    monkeypatch.setenv("PATCHBANK_CATALOGUE", "s3://team/~x")
    assert load_settings().catalogue == "s3://team/~x"


@pytest.mark.parametrize("scheme", CLIENTS)
def test_a_client_that_is_not_installed_is_told_with_the_line_that_installs_it(
    scheme: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("patchbank.pipeline.sharing.stores.find_spec", lambda name: None)
    assert main(["bank", "ls", f"{scheme}://team/banks"]) == 1
    package, extra = CLIENTS[scheme]
    told = f"error: {scheme}:// needs {package}: pip install 'patchbank[{extra}]'"
    assert told in capsys.readouterr().err


def test_the_extras_bring_the_clients_of_stores() -> None:
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for package, extra in CLIENTS.values():
        assert any(line.startswith(package) for line in extras[extra])
        assert extra in extras["remote"][0]
