"""The checks of the encoder contract, in the order in which they make sense."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from patchbank.pipeline.encoders.base import RESAMPLER
from patchbank.pipeline.encoders.bench import (
    Bench,
    Broken,
    Doubtful,
    NotAsked,
    Tokens,
    arrays,
    clip_of,
    largest_errors,
)
from patchbank.pipeline.encoders.catalogue import ENCODERS
from patchbank.pipeline.encoders.discovery import MEMBERS, is_file
from patchbank.pipeline.encoders.token_order import Reading, readings
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import EncoderSpec, Grid, LayerSpec, canonical_json, differing_fields

LARGEST_FLOAT16 = 65_504.0
LEAST_GAIN = 0.2
"""By how much another order has to explain the tokens better, of 2."""
LEAST_ORDER = 0.6
MOST_REVERSED = 0.3


@dataclass(frozen=True)
class Check:
    """One promise, and how it is tried."""

    name: str
    promise: str
    run: Callable[[Bench], str]
    """Says what it found; raises `Broken`, `Doubtful` or `NotAsked`."""
    needs: tuple[str, ...] = ()
    """Checks without which this one says nothing."""


def check_spec(bench: Bench) -> str:
    spec = bench.encoder.spec
    if not isinstance(spec, EncoderSpec):
        raise Broken(type(spec).__name__, expected="an EncoderSpec")
    problems = [*_problems_of_name(spec.name, bench.reference), *_problems_of_fields(spec)]
    if problems:
        raise Broken("; ".join(problems), expected="a spec that a bank's card can hold")
    return f"{spec.name}, encoder_id {spec.encoder_id[:12]}"


def _problems_of_name(name: object, reference: str) -> list[str]:
    if not isinstance(name, str) or not name.strip():
        return [f"name is {name!r}, not a text"]
    if is_file(reference) and name in ENCODERS:
        return [f"name is {name!r}, which is a shipped encoder; choose another"]
    if reference and not is_file(reference) and name != reference:
        return [f"name is {name!r}, which predict would not find; it is loaded as {reference!r}"]
    return []


def _problems_of_fields(spec: EncoderSpec) -> list[str]:
    problems = []
    if not _is_count(spec.sample_rate_hz):
        problems.append(f"sample_rate_hz is {spec.sample_rate_hz!r}, not a whole number from 1")
    if not re.fullmatch(r"([0-9a-f]{64})?", str(spec.weights_sha256)):
        problems.append("weights_sha256 is neither empty nor 64 hexadecimal digits")
    if spec.resampler != RESAMPLER:
        problems.append("resampler is not RESAMPLER, the one that audio comes through")
    numbers = [layer.layer for layer in spec.layers]
    if not numbers or len(set(numbers)) < len(numbers) or not all(map(_is_count, numbers)):
        problems.append(f"layers are numbered {numbers}, not by different numbers from 1")
    problems += [problem for layer in spec.layers for problem in _problems_of_layer(layer)]
    identity = spec.identity()
    try:
        # What changes on its way through JSON would never equal the card that it is written to.
        if differing := differing_fields(json.loads(canonical_json(identity)), identity):
            problems.append(f"{', '.join(differing)} become another value in JSON (a tuple?)")
    except (TypeError, ValueError) as error:
        problems.append(f"config or frontend is no JSON: {error}")
    return problems


def _problems_of_layer(layer: LayerSpec) -> list[str]:
    problems = []
    if not _is_count(layer.dim) or not _is_count(layer.n_prefix, least=0):
        problems.append(f"layer {layer.layer} has dim {layer.dim!r}, n_prefix {layer.n_prefix!r}")
    if not isinstance(layer.meaning, str) or not layer.meaning.strip():
        problems.append(f"layer {layer.layer} does not say what it means")
    return problems


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_licence(bench: Bench) -> str:
    spec = bench.encoder.spec
    if not spec.licence.strip():
        raise Doubtful(
            "no licence",
            expected="the licence of the weights, which lands in every bank's card",
            hint='EncoderSpec(..., licence="CC BY-NC 4.0", source="where they are from")',
        )
    return spec.licence


def check_encode(bench: Bench) -> str:
    try:
        bench.encoder.grids(bench.n_samples)
    except EncoderError as error:
        raise Broken(
            str(error), expected=f"clips of {bench.window_s:g} s", hint="choose a --window-s"
        ) from error
    tokens = bench.tokens
    expected = sorted(spec.layer for spec in bench.encoder.spec.layers)
    if sorted(tokens) != expected:
        raise Broken(f"layers {sorted(tokens)}", expected=f"those of the spec, {expected}")
    return f"{len(tokens)} layers of a clip of {bench.window_s:g} s"


def check_shapes(bench: Bench) -> str:
    two = bench.encode(torch.cat([bench.clip, bench.quiet]))
    for layer, token_map in two.items():
        grid, dim = token_map.grid, bench.encoder.spec.layer(layer).dim
        found, expected = tuple(token_map.patches.shape), (2, grid.n_patches, dim)
        if found != expected:
            raise Broken(
                f"layer {layer}: patches {found}",
                expected=f"(batch=2, patch={grid.time} * {grid.freq}, dim={dim}) = {expected}",
                hint="prefix tokens go into TokenMap.prefix; spec states the dim",
            )
    sizes = {f"{m.grid.time} x {m.grid.freq} x {m.patches.shape[2]}" for m in two.values()}
    return ", ".join(sorted(sizes)) if len(sizes) < 4 else f"{len(sizes)} different grids"


def check_dtype(bench: Bench) -> str:
    for name, values in arrays(bench.tokens).items():
        if values.dtype != torch.float32 or values.device.type != bench.device.type:
            raise Broken(
                f"{name}: {values.dtype} on {values.device.type}",
                expected=f"torch.float32 on {bench.device.type}, where the waveform is",
                hint="a bank rounds them itself, as its card says",
            )
    return "float32"


def check_prefix(bench: Bench) -> str:
    for layer, token_map in bench.tokens.items():
        spec = bench.encoder.spec.layer(layer)
        expected = (1, spec.n_prefix, spec.dim) if spec.n_prefix else None
        found = None if token_map.prefix is None else tuple(token_map.prefix.shape)
        if found != expected:
            raise Broken(f"layer {layer}: prefix {found}", expected=f"{expected}, as spec says")
    return ", ".join(sorted({str(spec.n_prefix) for spec in bench.encoder.spec.layers}))


def check_grids(bench: Bench) -> str:
    _compare_grids(bench.encoder.grids(bench.n_samples), bench.tokens, bench.n_samples)
    return f"as encode() gives for {bench.n_samples} samples"


def _compare_grids(stated: dict[int, Grid], tokens: Tokens, n_samples: int) -> None:
    found = {layer: token_map.grid for layer, token_map in tokens.items()}
    if stated != found:
        layer = next(k for k in [*found, *stated] if stated.get(k) != found.get(k))
        raise Broken(
            f"layer {layer}: grids({n_samples}) gives {stated.get(layer)}",
            expected=f"what encode() gives, {found.get(layer)}",
        )


def check_finite(bench: Bench) -> str:
    for what, tokens in bench.extremes.items():
        for name, values in arrays(tokens).items():
            if n_bad := int((~torch.isfinite(values)).sum()):
                raise Broken(
                    f"{name} of {what}: {n_bad} values are NaN or infinite",
                    expected="finite values",
                    hint="a logarithm of 0, or a division by a clip's own deviation?",
                )
    return "for a clip, silence and noise at full scale"


def check_range(bench: Bench) -> str:
    largest = 0.0
    for what, tokens in bench.extremes.items():
        for name, values in arrays(tokens).items():
            largest = max(largest, float(values.abs().max()))
            if largest > LARGEST_FLOAT16:
                raise Doubtful(
                    f"{name} of {what} reaches {largest:.3g}",
                    expected=f"at most {LARGEST_FLOAT16:g}, the largest number of float16",
                    hint="extract with --dtype bfloat16 or float32",
                )
            if not values.any():
                raise Doubtful(
                    f"{name} of {what} is zero everywhere",
                    expected="something to store",
                    hint="a clip whose tokens are all zero is recorded as failed",
                )
    return f"up to {largest:.3g}"


def check_determinism(bench: Bench) -> str:
    first = bench.tokens
    bench.encode(bench.loud)
    again = bench.encode(bench.clip)
    for name, error in largest_errors(again, first).items():
        if error:
            raise Broken(
                f"{name}: the same clip gives other tokens, by {error:.2g} of the largest",
                expected="equal to the last bit",
                hint="dropout or batch-norm that still trains (model.eval()), dither, or a state?",
            )
    return "equal to the last bit"


def check_reload(bench: Bench) -> str:
    other = bench.load()
    mine, its = bench.encoder.spec.identity(), other.spec.identity()
    if fields := differing_fields(its, mine):
        raise Broken(
            f"a second load() differs in {', '.join(fields)}",
            expected="one encoder_id",
            hint="weights that are drawn need a seed; hash the file, not the object",
        )
    errors = largest_errors(bench.encode(bench.clip, encoder=other), bench.tokens)
    _within(bench, errors, "after a second load()", "weights that are not loaded are random")
    return "one encoder_id, the same tokens"


def check_batch(bench: Bench) -> str:
    together = bench.encode(torch.cat([bench.quiet, bench.clip, bench.loud]))
    errors = largest_errors(clip_of(together, 1), bench.tokens)
    hint = "statistics over the batch, a mask of the longest clip, or batch-norm that trains?"
    return _within(bench, errors, "between a quiet and a loud clip", hint)


def check_order(bench: Bench) -> str:
    tokens, n_moments = bench.moved
    found: dict[int, Reading] = {}
    for layer, token_map in tokens.items():
        if token_map.grid.n_patches == 1:
            continue
        patches = token_map.patches
        stated, *others = readings(
            patches[0], patches[1 : n_moments + 1], patches[n_moments + 1 :], token_map.grid
        )
        best = max(others, key=lambda reading: reading.time + reading.freq)
        gain = best.time + best.freq - stated.time - stated.freq
        if gain > LEAST_GAIN or stated.time < MOST_REVERSED:
            _order_is_broken(layer, token_map.grid, stated, best if gain > LEAST_GAIN else None)
        if token_map.grid.time > 1:
            found[layer] = stated
    if not found:
        raise NotAsked("one time step a clip")
    best_layer = max(found, key=lambda layer: found[layer].time)
    if found[best_layer].time < LEAST_ORDER:
        _order_is_broken(best_layer, tokens[best_layer].grid, found[best_layer], None)
    return f"events and tokens follow each other, {found[best_layer].time:.2f} of 1"


def _order_is_broken(layer: int, grid: Grid, stated: Reading, better: Reading | None) -> None:
    explains = f"read so, tokens follow time by {stated.time:.2f} of 1"
    if better is not None:
        explains += f", read as {better.patch} by {better.time:.2f}"
    raise Broken(
        f"layer {layer}, {grid.time} x {grid.freq}: {explains}",
        expected="patch = t * F + f, Grid(time=T, freq=F)",
        hint="of a map (batch, dim, freq, time): map.permute(0, 3, 2, 1).flatten(1, 2)",
    )


def check_layers(bench: Bench) -> str:
    known = [spec.layer for spec in bench.encoder.spec.layers]
    for asked in ((known[0],), [known[-1]], {known[-1], known[0]}):
        some = bench.encode(bench.clip, asked)
        if set(some) != set(asked):
            raise Broken(
                f"asked for layers {sorted(asked)}, got {sorted(some)}", expected="what is asked"
            )
        errors = largest_errors(some, {layer: bench.tokens[layer] for layer in some})
        _within(bench, errors, f"asked for layers {sorted(asked)} only", "")
    return "some give what all give"


def check_lengths(bench: Bench) -> str:
    half, more = bench.n_samples // 2 + 7, bench.n_samples * 4 // 3 + 3
    taken = [n for n in (1, half, more) if _takes(bench, n)]
    return f"takes {len(taken)} of 3 other lengths, refuses the others"


def _takes(bench: Bench, n_samples: int) -> bool:
    try:
        stated = bench.encoder.grids(n_samples)
    except EncoderError:
        return False
    try:
        tokens = bench.encode(bench.noise(0.05, seed=6, n_samples=n_samples))
    except EncoderError as error:
        raise Broken(
            f"{n_samples} samples: grids() takes them, encode() does not: {error}",
            expected="EncoderError from grids(), before any audio is read",
        ) from error
    _compare_grids(stated, tokens, n_samples)
    for layer, token_map in tokens.items():
        n_patches = token_map.grid.n_patches
        if n_patches < 1 or token_map.patches.shape[1] != n_patches:
            raise Broken(
                f"{n_samples} samples: layer {layer} has {token_map.patches.shape[1]} patches",
                expected=f"{token_map.grid}, at least one; or EncoderError from grids()",
            )
    return True


def check_input(bench: Bench) -> str:
    waveform = bench.clip.to(bench.device, copy=True)
    before = waveform.clone()
    bench.encoder.encode(bench.encoder.frontend(waveform))
    if not torch.equal(waveform, before):
        raise Broken(
            "the waveform is another one afterwards",
            expected="the caller's waveform as it was",
            hint="x -= x.mean() changes it, x = x - x.mean() does not",
        )
    return "the waveform is as it was"


def check_inference(bench: Bench) -> str:
    with torch.inference_mode():
        tokens = bench.encode(bench.clip.clone())
        errors = largest_errors(tokens, bench.tokens)
    return _within(bench, errors, "under torch.inference_mode()", "")


def check_device(bench: Bench) -> str:
    moved = bench.encoder.to(bench.device)
    if missing := [name for name in MEMBERS if not hasattr(moved, name)]:
        raise Broken(
            f"to() returns {type(moved).__name__} without {', '.join(missing)}",
            expected="the encoder",
            hint="return self",
        )
    errors = largest_errors(bench.encode(bench.clip, encoder=moved), bench.tokens)
    return _within(bench, errors, f"after to({bench.device})", "")


def _within(bench: Bench, errors: dict[str, float], when: str, hint: str) -> str:
    name, error = max(errors.items(), key=lambda item: item[1])
    if not error <= bench.tolerance:
        raise Broken(
            f"{name} {when}: differs by {error:.2g} of the largest value",
            expected=f"at most {bench.tolerance:g}, for rounding",
            hint=hint,
        )
    return f"within {error:.1g} of the largest value"


CHECKS = (
    Check("spec", "the spec is whole and survives a bank's card", check_spec),
    Check("licence", "the licence of the weights is stated", check_licence, ("spec",)),
    Check("encode", "a clip gives tokens of every layer", check_encode, ("spec",)),
    Check("shapes", "patches are (batch, patch, dim)", check_shapes, ("encode",)),
    Check("dtype", "tokens are float32, on the waveform's device", check_dtype, ("encode",)),
    Check("prefix", "as many prefix tokens as the spec says", check_prefix, ("encode",)),
    Check("grids", "grids() knows the grid beforehand", check_grids, ("encode",)),
    Check("finite", "no NaN, no infinity, whatever the audio", check_finite, ("encode",)),
    Check("range", "tokens can be stored", check_range, ("finite",)),
    Check("determinism", "equal clips give equal tokens", check_determinism, ("encode",)),
    Check("reload", "loaded again, it is the same encoder", check_reload, ("determinism",)),
    Check("batch", "a clip does not depend on its batch", check_batch, ("determinism",)),
    Check("order", "tokens are time-major", check_order, ("shapes", "determinism", "finite")),
    Check("layers", "some layers are the same as all", check_layers, ("determinism",)),
    Check("lengths", "a length is taken or refused", check_lengths, ("shapes", "grids")),
    Check("input", "the waveform is left alone", check_input, ("encode",)),
    Check("inference", "works in inference mode", check_inference, ("determinism",)),
    Check("device", "to() moves and returns it", check_device, ("determinism",)),
)
"""All checks; each needs only earlier ones."""
