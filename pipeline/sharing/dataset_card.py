"""notes/README.md of a bank: what somebody who finds it needs to know, and how to read it.

Every sentence comes from a value of the bank, and no value becomes markup; the YAML header is what
model hubs read.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized

from patchbank.pipeline.bank.markdown import code, code_block, escaped, one_line
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.schema import DONE, FAILED
from patchbank.pipeline.sharing.licence import hub_identifier, is_stated, licence_warnings
from patchbank.pipeline.specs import Json, human_bytes

CATEGORIES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
"""The hub's sizes of data sets; each is ten times the one before."""
MOST_ROWS = 60
"""Of a table: splits and parents beyond are counted."""
LONGEST = 300
"""Characters of a value in the card."""


def dataset_card(
    bank: Bank,
    *,
    name: str,
    data: str | None = None,
    data_licence: str | None = None,
    url: str | None = None,
) -> str:
    """Markdown with a YAML header.

    `name` is that of the bank's folder, `data` and `data_licence` are what is said of the
    recordings, `url` where the bank lies, without credentials.
    """
    name = _cut(name)
    parts = [
        _header(bank, name, data, data_licence),
        _summary(bank, name, data),
        _layers(bank),
        _splits(bank),
        _origin(bank),
        _licences(bank, data_licence),
        _reading(bank, name, url),
        _verifying(bank, name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(bank: Bank, name: str, data: str | None, data_licence: str | None) -> str:
    encoder = str(bank.card["encoder"]["name"])
    licences = list(dict.fromkeys(map(hub_identifier, (bank.card["licence"], data_licence))))
    lines = ["---", f"pretty_name: {_yaml(name)}"]
    if len(licences) == 1:
        lines.append(f"license: {licences[0]}")
    else:
        lines += ["license:", *(f"- {one}" for one in licences)]
    if "other" in licences:
        others = [
            _slug(str(one))
            for one in (bank.card["licence"], data_licence)
            if hub_identifier(one) == "other"
        ]
        lines.append(f"license_name: {_yaml('-and-'.join(dict.fromkeys(others)))}")
    lines += ["size_categories:", f"- {_size_category(bank.n_clips)}"]
    tags = ("audio", "patchbank", "embeddings", encoder)
    lines += ["tags:", *(f"- {_yaml(tag)}" for tag in tags)]
    if data:
        lines += ["source_datasets:", f"- {_yaml(data)}"]
    # Tables of tokens are nothing that the hub's viewer shows.
    return "\n".join([*lines, "viewer: false", "---"])


def _summary(bank: Bank, name: str, data: str | None) -> str:
    card, window = bank.card, bank.card["window"]
    encoder = card["encoder"]
    n_failed = int((bank.status == FAILED).sum())
    of_data = f" of {escaped(_cut(data))}" if data else ""
    rows = {
        "encoder": f"{code(_cut(encoder['name']))}, at {encoder['sample_rate_hz']} Hz",
        "SHA-256 of its weights": code(_cut(encoder["weights_sha256"])) or "it has no weights",
        "source of its weights": escaped(_cut(card["source"])) or "not stated",
        "encoder id": code(bank.encoder_id),
        "window": f"{window['window_s']:g} s every {window['hop_s']:g} s, padded with "
        + ("zeros" if window["pad"] == "zero" else "the audio again"),
        "clips": f"{bank.n_clips}, {n_failed} of them failed and without tokens",
        "stored as": _stored_as(bank),
        "size": f"{human_bytes(bank.seal.bank_bytes)} in {len(bank.seal.files)} files",
        "fingerprint": code(bank.fingerprint),
        "root hash": code(bank.root_sha256),
    }
    return "\n".join(
        [
            f"# {escaped(name)}",
            "",
            f"What a frozen audio encoder makes of recordings{of_data}, as a bank of "
            "patchbank: a Zarr group with the tokens of every clip, to train probes from. The "
            "recordings themselves are not in it.",
            "",
            *_table(("", ""), rows.items()),
        ]
    )


def _stored_as(bank: Bank) -> str:
    if is_pooled(bank):
        return f"mean, max and min of each clip, float32, of {bank.schema.stored_dtype} tokens"
    compressed = ", compressed for cold storage" if bank.schema.is_archive else ""
    return f"{bank.schema.stored_dtype}{compressed}"


def is_pooled(bank: Bank) -> bool:
    """Whether a bank holds pooled vectors only, no tokens."""
    return bank.card.get("storage") == "pooled"


def _layers(bank: Bank) -> str:
    rows = [
        (
            str(spec.layer),
            escaped(_cut(spec.meaning)),
            f"{bank.schema.grids[spec.layer].time} x {bank.schema.grids[spec.layer].freq}",
            str(spec.n_prefix),
            str(spec.dim),
        )
        for spec in bank.schema.layers[:MOST_ROWS]
    ]
    columns = ("layer", "what it is", "patches, time x frequency", "prefix tokens", "dim")
    more = _more(bank.schema.layers)
    return "\n".join(["## Layers", "", *_table(columns, rows), *more])


def _splits(bank: Bank) -> str:
    if "split" not in bank.clips.column_names:
        return ""
    counts: Counter[str] = Counter(
        str(split)
        for split, status in zip(bank.clips["split"].to_pylist(), bank.status, strict=True)
        if split is not None and status in (DONE, FAILED)
    )
    rows = [(code(_cut(split)), str(n)) for split, n in counts.most_common(MOST_ROWS)]
    return "\n".join(["## Clips", "", *_table(("split", "clips"), rows), *_more(counts)])


def _origin(bank: Bank) -> str:
    parents = bank.card.get("derived_from", [])
    if not parents:
        return ""
    rows = [
        (code(one["fingerprint"]), code(_cut(one["stored_dtype"])), escaped(_cut(_held(one))))
        for one in parents[:MOST_ROWS]
    ]
    columns = ("fingerprint", "stored as", "what it held")
    lead = "This bank was made from other banks, without the encoder:"
    return "\n".join(["## Made from", "", lead, "", *_table(columns, rows), *_more(parents)])


def _held(parent: Json) -> str:
    """What a card says of a bank that another one was cut from."""
    named = {"clips": "n_clips", "layers": "layers", "of which splits": "splits"}
    facts = [f"{what} {json.dumps(parent[key])}" for what, key in named.items() if key in parent]
    return ", ".join(facts) or "not stated"


def _more(values: Sized) -> list[str]:
    return ["", f"and {len(values) - MOST_ROWS} more"] if len(values) > MOST_ROWS else []


def _licences(bank: Bank, data_licence: str | None) -> str:
    def said(licence: str | None) -> str:
        return escaped(_cut(str(licence))) if is_stated(licence) else "not stated"

    rows = {
        "the encoder's weights": said(bank.card["licence"]),
        "the recordings": said(data_licence),
    }
    warnings = [f"- {escaped(one[:1].upper() + one[1:])}." for one in _cautions(bank, data_licence)]
    lead = "Tokens are made with the weights, of the recordings; both licences may bind you."
    lines = ["## Licences", "", lead, "", *_table(("of", "licence"), rows.items())]
    return "\n".join([*lines, *([""] if warnings else []), *warnings])


def _cautions(bank: Bank, data_licence: str | None) -> Iterator[str]:
    for one in licence_warnings(bank, data_licence=data_licence):
        yield _cut(one.replace("; name it with --data-licence, and ask", "; ask"))


def _reading(bank: Bank, name: str, url: str | None) -> str:
    place = one_line(url) if url else name
    commands = [
        shlex.join(["patchbank", "bank", "pull", place]),
        shlex.join(["patchbank", "train-probe", place, "--labels", "LABELS.csv",
                    *(["--probe", "linear"]), "--out", "run"]),
    ]  # fmt: skip
    pulled = "\n".join(commands if url else commands[1:])
    layer = bank.layers[-1]
    with_patchbank = [
        "from patchbank.pipeline import open_bank",
        "",
        f"bank = open_bank({_python(name)})  # or the address",
        "clips = bank.clips  # a row a clip: clip_id, path, start_s, split ...",
        f"vectors = bank.pooled({layer})  # mean over patches, (clip, dim)",
    ]
    if not is_pooled(bank):
        with_patchbank.append(
            f"tokens = bank.rows_view({layer})  # (clip, patch, dim), read when asked for"
        )
    return "\n\n".join(
        [
            "## Reading it",
            "With patchbank: fetch it, or train from where it lies." if url else "With patchbank:",
            code_block("bash", pulled),
            code_block("python", "\n".join(with_patchbank)),
            "With zarr alone, from the folder that the bank lies in:",
            code_block("python", "\n".join(_zarr_code(bank, name))),
            "A row whose `status` is 2 failed and has no tokens; 3 is an empty slot. The grid is "
            "time-major: patch `t * freq + f`.",
        ]
    )


def _zarr_code(bank: Bank, name: str) -> Iterator[str]:
    """Lines that give `tokens` as floats, or `vectors` of a bank without tokens."""
    yield from ("import numpy as np", "import pyarrow.parquet as pq", "import zarr", "")
    yield f"bank = {_python(name)}"
    yield f'layer = zarr.open_group(bank, mode="r")["layers/{bank.layers[-1]}"]'
    yield 'clips = pq.read_table(bank + "/clips.parquet")'
    yield 'rows = np.flatnonzero(clips["status"].to_numpy() == 1)[:16]  # clips with tokens'
    if is_pooled(bank):
        yield 'vectors = layer["mean"].oindex[rows]  # (clip, dim)'
        return
    stored = bank.schema.stored_dtype
    yield 'tokens = layer["patches"].oindex[rows]  # (clip, patch, dim)'
    if stored == "bfloat16":
        yield 'tokens = (tokens.astype("u4") << 16).view("f4")'
    if stored == "int4":
        yield 'tokens = np.stack([tokens & 15, tokens >> 4], -1).astype("f4") - 8'
        yield "tokens = tokens.reshape(*tokens.shape[:2], -1)"
    if stored in ("int8", "int4"):
        yield 'scale = layer["scale"].oindex[rows].astype("f4")  # one a token'
        yield 'tokens = tokens.astype("f4") * scale[..., None]'
    if stored == "int4":
        yield 'rotation = layer["rotation"][:]'
        yield "blocks = tokens.reshape(*tokens.shape[:2], -1, len(rotation))"
        yield "tokens = (blocks @ rotation).reshape(tokens.shape)"
    if stored in ("int8", "int4"):
        yield 'tokens = tokens * layer["channel_scale"][:] + layer["channel_shift"][:]'


def _verifying(bank: Bank, name: str) -> str:
    verify = ["patchbank", "bank", "verify", name]
    return "\n\n".join(
        [
            "## Checking it",
            "`seal.json` has the size and the SHA-256 of every file; pull compares them as they "
            f"come. The fingerprint, {code(bank.fingerprint)}, is the same wherever these tokens "
            "of these clips lie. Compare it with what its makers told you, or check a signature "
            "(`notes/seal.json.sig`) against the keys that you trust:",
            code_block(
                "bash",
                f"{shlex.join(verify)}\n{shlex.join([*verify, '--allowed-signers', 'FILE'])}",
            ),
        ]
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _size_category(n_clips: int) -> str:
    above = sum(n_clips >= 10 ** (3 + power) for power in range(len(CATEGORIES) - 1))
    return CATEGORIES[above]


def _cut(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80] or "other"


def _yaml(text: str) -> str:
    """A JSON string, which is a YAML string, whatever is in it."""
    return json.dumps(_cut(text), ensure_ascii=False)


def _python(text: str) -> str:
    """A string that means the same to Python."""
    return json.dumps(text)
