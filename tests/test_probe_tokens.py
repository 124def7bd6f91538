"""Every probe on tokens as banks store them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from probe_weights import weights_of

from patchbank.pipeline.bank.dtypes import STORED_TYPES
from patchbank.pipeline.bank.quantised import ChannelConstants
from patchbank.probing.batch import NO_LAYER, Batch, LayerTokens
from patchbank.probing.decoding import Dequantiser, QuantisedTokens
from patchbank.probing.probes import PROBES, build_probe, tokens
from patchbank.probing.probes.base import ProbeShape
from patchbank.probing.probes.tokens import Buffers, Tokens, convert

SHAPE = ProbeShape(dim=24, n_classes=3, n_prefix=1, grid=(4, 2))
CPU = torch.device("cpu")


def stored_as(name: str) -> tuple[LayerTokens, torch.Tensor]:
    """Tokens of five clips in a stored type, and their patches as floats."""
    random = np.random.default_rng(0)
    prefix = torch.from_numpy(random.normal(size=(5, 1, 24)).astype(np.float32)).half()
    n_patches = torch.tensor([8, 1, 5, 2, 8])
    if name in ("float16", "bfloat16"):
        patches = torch.from_numpy(random.normal(size=(5, 8, 24)).astype(np.float32))
        stored = patches.to(getattr(torch, name))
        return LayerTokens(stored, prefix, n_patches), stored.float()
    # Powers of two, so that no order of the sums rounds.
    constants = ChannelConstants(
        random.integers(-3, 4, size=24).astype(np.float32),
        (2.0 ** random.integers(-2, 3, size=24)).astype(np.float32),
    )
    codes = random.integers(-127, 128, size=(5, 8, 24)).astype(np.int8)
    scale = (2.0 ** random.integers(-7, -4, size=(5, 8))).astype(np.float16)
    quantised = QuantisedTokens(
        Dequantiser(constants, STORED_TYPES["int8"], CPU), torch.from_numpy(scale)
    )
    layer = LayerTokens(torch.from_numpy(codes), prefix, n_patches, quantised=quantised)
    return layer, torch.from_numpy(constants.dequantise(codes, scale))


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("block", [tokens.BLOCK_VALUES, 400], ids=["at once", "by two clips"])
def test_logits_of_stored_tokens_are_those_of_their_floats(
    name: str, stored: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BLOCK_VALUES", block)
    layer, patches = stored_as(stored)
    batch = Batch(np.arange(5), {NO_LAYER: layer})
    seen = convert(batch, dtype=torch.float32, device=CPU, buffers=Buffers())
    assert layer.prefix is not None
    floats = Tokens(patches, layer.prefix.float(), layer.n_patches)
    probe = build_probe(name, SHAPE)
    weights = weights_of(probe, name)
    torch.testing.assert_close(probe.logits(weights, seen), probe.logits(weights, floats))
