"""What a bank holds, as facts and as lines for a terminal of 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchbank.pipeline.bank import Bank

Facts = dict[str, Any]
LONGEST_VALUE = 1_000


def bank_facts(bank: Bank) -> Facts:
    """What `bank show --json` prints."""
    from patchbank.pipeline.bank.view_columns import count_views
    from patchbank.probing.measurements import read_measurements

    card, clips = bank.card, bank.clips.select(["status", "reason"]).to_pylist()
    reasons = Counter(str(row["reason"]) for row in clips if row["status"] == 2)
    return {
        "bank": bank.where,
        "fingerprint": bank.fingerprint,
        "recipe_id": bank.recipe_id,
        "root_sha256": bank.root_sha256,
        "encoder": card["encoder"]["name"],
        "encoder_id": bank.encoder_id,
        "weights_sha256": card["encoder"]["weights_sha256"],
        "layers": {str(layer): card["layers"][str(layer)] for layer in bank.layers},
        "dtype": card["stored_dtype"],
        "archive": bank.schema.is_archive,
        "pooled_only": not bank.schema.holds_tokens,
        "window": card["window"],
        "sample_rate_hz": card["encoder"]["sample_rate_hz"],
        "clips": bank.n_clips,
        "views": count_views(bank.clips),
        "augment": card.get("augment"),
        "generations": list(bank.schema.generations),
        "holes": bank.n_rows - bank.n_clips,
        "growing_to": growing_to(bank),
        "failed": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
        "bytes": bank.seal.bank_bytes,
        "bytes_of": bytes_by_kind(bank),
        "shards": bank.schema.n_shards,
        "rows_per_shard": bank.schema.rows_per_shard,
        "extraction": card["extraction"],
        "derived_from": card.get("derived_from", []),
        "measured": read_measurements(bank),
        "licence": card["licence"],
        "source": card["source"],
        "card": card,
    }


def growing_to(bank: Bank) -> int | None:
    """Clips of the bank once a growth that was begun is finished; None where there is none."""
    from patchbank.pipeline.bank.card import read_attributes
    from patchbank.pipeline.bank.growth import next_folder
    from patchbank.pipeline.errors import BankError

    try:
        return int(sum(read_attributes(next_folder(bank.path))["card"]["generations"]))
    except (BankError, KeyError, TypeError, ValueError):
        return None


def bytes_by_kind(bank: Bank) -> dict[str, int]:
    """Bytes of each token array, and of everything else."""
    paths = [array.path for array in bank.schema.arrays()]
    sizes = dict.fromkeys([*paths, "other"], 0)
    for name, file in bank.seal.files.items():
        folder = name.rpartition("/")[0]
        sizes[folder if folder in sizes else "other"] += file.size
    return sizes


def readable_facts(facts: Facts) -> Iterator[tuple[str, str]]:
    """Names and sentences of `bank show`, in order."""
    from patchbank.pipeline.specs import human_bytes

    window = facts["window"]
    yield "bank", facts["bank"]
    yield "fingerprint", facts["fingerprint"][:12]
    yield "encoder", f"{facts['encoder']}, {facts['encoder_id'][:12]}"
    yield "weights", facts["weights_sha256"][:12] or "none"
    for layer, spec in facts["layers"].items():
        grid = f"{spec['grid']['time']} x {spec['grid']['freq']} patches of {spec['dim']}"
        prefix = f" and {spec['n_prefix']} prefix" if spec["n_prefix"] else ""
        n_bytes = sum(n for path, n in facts["bytes_of"].items() if f"/{layer}/" in path)
        yield f"layer {layer}", f"{grid}{prefix}, {spec['meaning']}, {human_bytes(n_bytes)}"
    archive = ", archive, compressed: convert it to train from it" * facts["archive"]
    pooled = ", pooled vectors of these tokens only (mean, max, min)" * facts["pooled_only"]
    yield "dtype", f"{facts['dtype']}{archive}{pooled}"
    for line in readable_measurements(facts["measured"]):
        yield "", line
    yield (
        "window",
        f"{window['window_s']:g} s every {window['hop_s']:g} s at {facts['sample_rate_hz']} Hz, "
        f"pad {window['pad']}",
    )
    views = f", {facts['views']} of them views" if facts["views"] else ""
    yield "clips", f"{facts['clips']}{views}, {facts['failed']} failed"
    if facts["augment"]:
        yield "views", readable_augment(facts["augment"])
    for reason, n_clips in facts["reasons"].items():
        yield "", f"{n_clips} x {reason}"
    if facts["holes"]:
        grown = " + ".join(map(str, facts["generations"]))
        yield "", f"came as {grown}; {facts['holes']} empty slots between"
    if facts["growing_to"]:
        yield "", f"growing to {facts['growing_to']}; the same extract command finishes that"
    yield "size", f"{human_bytes(facts['bytes'])} in {facts['shards']} shards a layer"
    ran = facts["extraction"]
    versions = ", ".join(f"{name} {v}" for name, v in ran["versions"].items() if name != "zarr")
    yield "computed", f"on {ran['device']}, {ran['batch_size']} clips a batch; {versions}"
    for parent in facts["derived_from"]:
        yield "made from", readable_origin(parent)
    yield "licence", facts["licence"] or "not stated"
    yield "source", facts["source"] or "not stated"


def readable_origin(parent: Facts) -> str:
    """A bank that another was made of, and what was there to choose from."""
    from patchbank.pipeline.bank.damage import shown

    parts = [parent["fingerprint"][:12], parent["stored_dtype"]]
    if "n_clips" in parent:
        parts.append(f"{parent['n_clips']} clips")
    if parent.get("layers"):
        parts.append(f"layers {','.join(map(str, parent['layers']))}")
    if parent.get("splits"):
        parts.append(f"of which split {' and '.join(map(shown, parent['splits']))}")
    return ", ".join(parts)


def readable_augment(augment: Facts) -> str:
    """How views were made: each augmentation with its parameters, and the seed."""
    made = []
    for name in ("mixup", "shift", "gain"):
        if name in augment:
            values = [f"{key} {value}" for key, value in augment[name].items() if value is not None]
            made.append(f"{name} ({', '.join(values)})" if values else name)
    return f"{', '.join(made)}, seed {augment['seed']}"


def readable_measurements(measured: list[Facts]) -> Iterator[str]:
    """What other stored types cost the probes, a line a label table."""
    for facts in measured:
        points = ", ".join(
            f"{name} {100 * change:+.2f}" for name, change in facts["changes"].items()
        )
        yield (
            f"against {facts['reference']}: {points} points of {facts['metric']} "
            f"(layer {facts['layer']}, {facts['labels']}, {facts['n_seeds']} seeds)"
        )


def print_fact(name: str, value: str) -> None:
    """A name and its value, wrapped beside it to 80 columns."""
    import textwrap

    lead = f"{name:<13}"
    # What a stranger's card says of licence and source must not move the terminal.
    value = " ".join(value.split())
    if not value.isprintable():
        value = value.encode("unicode_escape", "backslashreplace").decode("ascii")
    value = value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]} ..."
    print(textwrap.fill(value, 80, initial_indent=lead, subsequent_indent=" " * 13) or lead)
