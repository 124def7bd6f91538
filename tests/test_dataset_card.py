"""README.md of a bank that is shared: what it says is so, and its code runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.rows import TokenFloats
from patchbank.pipeline.encoders.catalogue import ENCODERS
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.pipeline.sharing.dataset_card import CATEGORIES, _size_category, dataset_card
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.licence import HUB_LICENCES, hub_identifier, licence_warnings
from patchbank.pipeline.sharing.push import push_bank

HOSTILE = (
    'x"\n---\nlicense: mit\n|a|<script>alert(1)</script> `rm -rf ~` **b** [c](http://d) $e$ # f '
    "\u202e\u2028\x1b[31m ``` ' \\ &amp; {%raw%}"
)


def with_card(bank: Bank, **changes: Any) -> Bank:
    """The same bank, whose card says something else."""
    attributes = {
        "card": {**bank.card, **changes},
        "encoder_id": bank.encoder_id,
        "recipe_id": bank.recipe_id,
    }
    return Bank(bank.path, attributes, bank.seal, bank.schema)


def header_of(card: str) -> dict[str, Any]:
    _, header, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(header)
    return found


def code_blocks(card: str, language: str) -> list[str]:
    tokens = MarkdownIt().parse(card)
    return [one.content for one in tokens if one.type == "fence" and one.info == language]


def rendered(card: str) -> str:
    """The text of a card without its header, as HTML."""
    return str(MarkdownIt().enable("table").render(card.split("---\n", 2)[2]))


def test_the_header_is_what_hubs_read(sealed: Bank) -> None:
    card = dataset_card(sealed, name="x.bank", data="ESC-50", data_licence="CC BY-NC 4.0")
    assert header_of(card) == {
        "pretty_name": "x.bank",
        "license": ["apache-2.0", "cc-by-nc-4.0"],
        "size_categories": ["n<1K"],
        "tags": ["audio", "patchbank", "embeddings", "fake"],
        "source_datasets": ["ESC-50"],
        "viewer": False,
    }
    assert DatasetCard(card).data.to_dict() == header_of(card)
    bare = header_of(dataset_card(with_card(sealed, licence=""), name="x.bank"))
    assert bare["license"] == "unknown"
    assert "source_datasets" not in bare
    own = header_of(dataset_card(sealed, name="x.bank", data_licence="Team rules, v. 2"))
    assert own["license"] == ["apache-2.0", "other"]
    assert own["license_name"] == "team-rules-v.-2"


def test_the_text_says_what_the_bank_holds(sealed: Bank) -> None:
    card = dataset_card(
        sealed, name="x.bank", data="ESC-50", data_licence="CC0", url="s3://t/x.bank"
    )
    for words in (
        f"| fingerprint | `{sealed.fingerprint}` |",
        f"| root hash | `{sealed.root_sha256}` |",
        f"| encoder id | `{sealed.encoder_id}` |",
        "| 2 | projected frame statistics, pairs averaged | 5 x 2 | 1 | 12 |",
        "| `train` | 20 |",
        "| clips | 40, 0 of them failed and without tokens |",
        "| stored as | float16 |",
        "| the recordings | CC0 |",
        "recordings of ESC-50",
        "patchbank bank pull s3://t/x.bank",
    ):
        assert words in card
    assert "Made from" not in card


@pytest.fixture(scope="module")
def stored(sealed: Bank, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bank]:
    """The same bank in each type."""
    folder = tmp_path_factory.mktemp("types")
    banks = {
        dtype: rebuild_bank([sealed], folder / f"{dtype}.bank", dtype=dtype)  # type: ignore[arg-type]
        for dtype in ("bfloat16", "int8", "int4")
    }
    return {"float16": sealed} | banks


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_the_code_for_zarr_gives_the_tokens(
    stored: dict[str, Bank], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = stored[dtype]
    monkeypatch.chdir(bank.path.parent)
    card = dataset_card(bank, name=bank.path.name)
    _, plain = code_blocks(card, "python")
    found: dict[str, Any] = {}
    exec(plain, found)
    rows = found["rows"]
    assert len(rows) == 16
    expected = np.stack([TokenFloats(bank, bank.array(2)).read(int(row)) for row in rows])
    np.testing.assert_allclose(found["tokens"], expected, rtol=1e-6, atol=1e-6)
    assert found["clips"]["clip_id"].equals(bank.clips["clip_id"])


def test_the_code_for_patchbank_runs_and_says_what_it_was_made_from(
    sealed: Bank, stored: dict[str, Bank], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = stored["int8"]
    monkeypatch.chdir(bank.path.parent)
    card = dataset_card(bank, name=bank.path.name)
    own, _ = code_blocks(card, "python")
    found: dict[str, Any] = {}
    exec(own, found)
    assert found["tokens"].shape == (40, 10, 12)
    assert found["vectors"].shape == (40, 12)
    assert f"| `{sealed.fingerprint}` | `float16` |" in card


def test_the_code_for_a_bank_without_tokens_gives_its_vectors(
    sealed: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = rebuild_bank([sealed], tmp_path / "pooled.bank", storage="pooled")
    monkeypatch.chdir(tmp_path)
    card = dataset_card(bank, name="pooled.bank")
    for block in code_blocks(card, "python"):
        found: dict[str, Any] = {}
        exec(block, found)
        assert "tokens" not in found
        np.testing.assert_array_equal(found["vectors"][:16], bank.pooled(2)[:16])
    assert "mean, max and min of each clip, float32, of float16 tokens" in card


def test_no_value_becomes_markup(sealed: Bank) -> None:
    encoder = {**sealed.card["encoder"], "name": HOSTILE, "weights_sha256": HOSTILE}
    parents = [{"fingerprint": "0" * 64, "stored_dtype": HOSTILE, "splits": [HOSTILE], "layers": 3}]
    hostile = with_card(
        sealed, encoder=encoder, licence=HOSTILE, source=HOSTILE, derived_from=parents
    )
    hostile.__dict__["clips"] = sealed.clips.set_column(
        sealed.clips.column_names.index("split"), "split", [[HOSTILE] * 40]
    )
    hostile.schema = replace(
        sealed.schema,
        layers=tuple(replace(spec, meaning=HOSTILE) for spec in sealed.schema.layers),
    )
    card = dataset_card(hostile, name=HOSTILE, data=HOSTILE, data_licence=HOSTILE, url=HOSTILE)
    header = header_of(card)
    assert set(header) == {
        "pretty_name", "license", "license_name", "size_categories", "tags", "source_datasets",
        "viewer",
    }  # fmt: skip
    assert header["license"] == "other"
    assert header["tags"][-1].startswith('x" --- license: mit |a|<script>')
    assert set(re.findall(r"[^\n]", card)) <= {one for one in card if one.isprintable()}
    html = rendered(card)
    assert not set(re.findall(r"<(\w+)", html)) & {"script", "a", "em", "strong", "img"}
    plain = rendered(dataset_card(sealed, name="x", data="y", data_licence="MIT", url="z"))
    for tag in ("<h1", "<h2", "<pre", "<table"):
        extra = 1 if tag in ("<h2", "<table") else 0  # what it was made from
        assert html.count(tag) == plain.count(tag) + extra
    for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    first = code_blocks(card, "python")[1]
    compile(first, "card", "exec")
    assert "alert(1)" in first.splitlines()[4]


@pytest.mark.parametrize(
    ("licence", "found"),
    [
        ("Apache-2.0", "apache-2.0"), ("MIT", "mit"), ("CC-BY-NC-4.0", "cc-by-nc-4.0"),
        ("CC BY-NC 4.0", "cc-by-nc-4.0"), ("cc0", "cc0-1.0"), ("not stated", "unknown"),
        ("", "unknown"), (None, "unknown"), ("ask Eva", "other"), ("CC BY 5.0", "other"),
    ],
)  # fmt: skip
def test_licences_are_named_as_the_hub_names_them(licence: str | None, found: str) -> None:
    assert hub_identifier(licence) == found


def test_every_shipped_encoder_has_a_licence_that_the_hub_knows_or_none() -> None:
    found = {hub_identifier(entry.licence) for entry in ENCODERS.values()}
    assert found <= HUB_LICENCES | {"unknown"}


@pytest.mark.parametrize(
    ("weights", "data", "words"),
    [
        ("MIT", "CC-BY-4.0", []),
        ("not stated", "MIT", ["licence of fake's weights is not stated"]),
        ("MIT", None, [r"licence of the recordings is not known; name it with --data-licence"]),
        ("CC-BY-NC-4.0", "MIT", ["fake's weights, CC-BY-NC-4.0, allows no commercial use"]),
        ("MIT", "for research only", ["the recordings, for research only, allows no commercial"]),
        ("MIT", "non commercial", ["allows no commercial use"]),
        ("MIT", "CC BY-NC-ND 4.0", ["allows no commercial use", "allows no derivatives"]),
        ("", "", ["weights is not stated", "recordings is not known"]),
    ],
)
def test_what_a_licence_forbids_is_said_before_a_push(
    sealed: Bank, weights: str, data: str | None, words: list[str]
) -> None:
    found = licence_warnings(with_card(sealed, licence=weights), data_licence=data)
    assert len(found) == len(words)
    for line, wanted in zip(found, words, strict=True):
        assert re.search(wanted, line)
    card = dataset_card(with_card(sealed, licence=weights), name="x", data_licence=data)
    assert card.count("\n- The licence of") == len(words)
    assert "--data-licence" not in card


@pytest.mark.parametrize(
    ("n_clips", "category"), [(999, "n<1K"), (1_000, "1K<n<10K"), (2_000_000, "1M<n<10M")]
)
def test_sizes_are_told_in_the_hubs_steps(n_clips: int, category: str) -> None:
    assert _size_category(n_clips) == category
    assert _size_category(10**12) == CATEGORIES[-1]


def test_nothing_but_sealed_files_and_known_notes_is_sent(copy: Path, tmp_path: Path) -> None:
    bank = open_bank(copy)
    (copy / "notes").mkdir(exist_ok=True)
    for name in (
        "clip.wav",
        "card.md",
        "seal.json.sig",
        "profile.json",
        "measured/l.json",
        "measured/x.wav",
    ):
        (copy / "notes" / name).parent.mkdir(exist_ok=True)
        (copy / "notes" / name).write_bytes(b"RIFF")
    (copy / "audio.flac").write_bytes(b"fLaC")
    (copy / "layers" / "take.wav").write_bytes(b"RIFF")
    there = FolderStore(tmp_path / "there.bank")
    push_bank(bank, there, notes={"notes/README.md": dataset_card(bank, name="x").encode()})
    notes = {"notes/README.md", "notes/seal.json.sig", "notes/measured/l.json"}
    assert set(there.sizes()) == {*bank.seal.files, "seal.json", *notes}
