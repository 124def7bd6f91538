"""The checks of the encoder contract, in the order in which they make sense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from patchbank.pipeline.encoders.base import TokenMap
from patchbank.pipeline.encoders.bench import (
    Bench,
    Broken,
    Doubtful,
    Tokens,
    arrays,
    clip_of,
    largest_errors,
)
from patchbank.pipeline.encoders.discovery import MEMBERS
from patchbank.pipeline.encoders.spec_checks import check_licence, check_spec
from patchbank.pipeline.encoders.token_order import check_order
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import Grid, differing_fields

LARGEST_FLOAT16 = 65_504.0
ANOTHER_WINDOW = "choose another --window-s"


@dataclass(frozen=True)
class Check:
    """One promise, and how it is tried."""

    name: str
    promise: str
    run: Callable[[Bench], str]
    """Says what it found; raises `Broken`, `Doubtful` or `NotAsked`."""
    needs: tuple[str, ...] = ()
    """Checks without which this one says nothing."""


def check_encode(bench: Bench) -> str:
    """Whether a clip goes through, and gives the layers of the spec."""
    try:
        bench.encoder.grids(bench.n_samples)
    except EncoderError as error:
        raise Broken(
            str(error), expected=f"clips of {bench.window_s:g} s", hint=ANOTHER_WINDOW
        ) from error
    waveform = bench.clip.to(bench.device, copy=True)
    returned: object = bench.encoder.encode(bench.encoder.frontend(waveform))
    values = list(returned.values()) if isinstance(returned, Mapping) else [returned]
    strange = [value for value in values if not isinstance(value, TokenMap)]
    if strange:
        where = "a mapping to " if isinstance(returned, Mapping) else ""
        raise Broken(
            f"encode() returns {where}a {type(strange[0]).__name__}",
            expected="{layer: TokenMap(patches, prefix, grid)}",
        )
    tokens = bench.tokens
    expected = sorted(spec.layer for spec in bench.encoder.spec.layers)
    if sorted(tokens) != expected:
        raise Broken(f"layers {sorted(tokens)}", expected=f"those of the spec, {expected}")
    return f"{len(tokens)} layers of a clip of {bench.window_s:g} s"


def check_shapes(bench: Bench) -> str:
    """Whether patches have the batch, the grid and the width that are stated."""
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
    """Whether tokens are float32 where the waveform is."""
    for name, values in arrays(bench.tokens).items():
        if values.dtype != torch.float32 or values.device.type != bench.device.type:
            raise Broken(
                f"{name}: {values.dtype} on {values.device.type}",
                expected=f"torch.float32 on {bench.device.type}, where the waveform is",
                hint="a bank rounds them itself, as its card says",
            )
    return "float32"


def check_prefix(bench: Bench) -> str:
    """Whether there are as many prefix tokens as the spec says."""
    for layer, token_map in bench.tokens.items():
        spec = bench.encoder.spec.layer(layer)
        expected = (1, spec.n_prefix, spec.dim) if spec.n_prefix else None
        found = None if token_map.prefix is None else tuple(token_map.prefix.shape)
        if found != expected:
            raise Broken(f"layer {layer}: prefix {found}", expected=f"{expected}, as spec says")
    return ", ".join(sorted({str(spec.n_prefix) for spec in bench.encoder.spec.layers}))


def check_grids(bench: Bench) -> str:
    """Whether `grids()` announces what `encode()` gives."""
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
    """Whether all tokens are finite, of silence and of noise at full scale too."""
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
    """Whether tokens fit into float16 and are not zero; a warning where not."""
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
    """Whether a clip gives the same bits again, after another clip."""
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
    """Whether a second `load()` gives the same identity and tokens."""
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
    """Whether a clip between a quiet and a loud one gives what it gives alone."""
    together = bench.encode(torch.cat([bench.quiet, bench.clip, bench.loud]))
    errors = largest_errors(clip_of(together, 1), bench.tokens)
    hint = "statistics over the batch, a mask of the longest clip, or batch-norm that trains?"
    return _within(bench, errors, "between a quiet and a loud clip", hint)


def check_layers(bench: Bench) -> str:
    """Whether asking for some layers gives these, as asking for all does."""
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
    """Whether other lengths are either encoded as announced or refused by `grids()`."""
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
    except Exception as error:  # of whatever lies below a stranger's encoder
        said = str(error).splitlines()[0][:120] if str(error) else ""
        raise Broken(
            f"{n_samples} samples: grids() takes them, encode() does not: "
            f"{type(error).__name__}: {said}",
            expected="EncoderError from grids(), before any audio is read",
            hint="raise EncoderError in grids() where n_samples are too few or too many",
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
    """Whether the waveform is left as it was."""
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
    """Whether the tokens are the same in inference mode."""
    with torch.inference_mode():
        tokens = bench.encode(bench.clip.clone())
        errors = largest_errors(tokens, bench.tokens)
    return _within(bench, errors, "under torch.inference_mode()", "")


def check_device(bench: Bench) -> str:
    """Whether `to()` returns the encoder."""
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
