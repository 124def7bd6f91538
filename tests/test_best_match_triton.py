"""The GPU kernel: interpreted and compiled without a GPU, run on one with -m gpu."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from kernel_checks import SHAPES, STORED, stored_tokens

from patchbank.probing.batch import LayerTokens
from patchbank.probing.losses import asymmetric
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import ProbeShape
from patchbank.probing.probes.best_match import match_tokens
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.trials import Trial, TrialStack

CHECKS = Path(__file__).parent / "kernel_checks.py"
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install triton"
)


def run_checks(device: str, *, interpreted: bool) -> list[str]:
    """A line for each case."""
    env = os.environ | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    done = subprocess.run(
        [sys.executable, str(CHECKS), device], capture_output=True, text=True, env=env, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@needs_triton
def test_the_kernel_agrees_with_plain_torch_when_it_is_interpreted() -> None:
    lines = run_checks("cpu", interpreted=True)
    assert len(lines) == 2 * len(SHAPES) * len(STORED) + 1
    assert all(line.endswith(": equal") for line in lines)


@needs_triton
@pytest.mark.gpu
def test_the_kernel_agrees_with_plain_torch_on_a_gpu() -> None:
    assert all(line.endswith(": equal") for line in run_checks("cuda", interpreted=False))


POINTERS = {"prototypes": "fp16", "counts": "i32", "winner_out": "i32"}


@needs_triton
@pytest.mark.parametrize(
    ("stored", "compared"), [("fp16", "fp16"), ("i8", "fp16"), ("bf16", "fp32"), ("fp32", "fp32")]
)
def test_the_kernel_compiles_for_a_gpu_that_is_not_there(stored: str, compared: str) -> None:
    """Down to the machine code of an H100, which says whether tensor cores do the products."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from patchbank.probing.probes.best_match_triton import SIZES, _match_kernel

    prototypes, patches, dims, n_stages, n_warps = SIZES[-1]
    constants = {
        "n_patches": 512,
        "dim": 768,
        "HAS_OFFSET": stored == "i8",
        "PROTOTYPES": prototypes,
        "PATCHES": patches,
        "DIMS": dims,
    }
    pointers = POINTERS | {"tokens": stored, "prototypes": compared}
    signature = {
        name: "constexpr"
        if name in constants
        else "i32"
        if name == "n_prototypes"
        else f"*{pointers.get(name, 'fp32')}"
        for name in _match_kernel.arg_names
    }
    source = ASTSource(_match_kernel, signature, constants)
    options = {"num_stages": n_stages, "num_warps": n_warps}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 227 * 1024


@pytest.mark.parametrize("stored", STORED)
def test_tokens_on_a_cpu_and_in_float64_become_floats(stored: str) -> None:
    tokens = stored_tokens(stored, (2, 5, 8), None, "cpu")
    assert tokens.stored_directions is None
    prototypes = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = (tokens.directions @ prototypes.T).amax(dim=1)
    torch.testing.assert_close(match_tokens(tokens, prototypes), expected)


@pytest.mark.parametrize("stored", STORED)
def test_directions_as_stored_are_the_directions(stored: str) -> None:
    tokens = stored_tokens(stored, (11, 5, 8), None, "cpu")
    found = tokens._as_stored()
    directions = found.factor[..., None] * found.raw.float()
    if found.channel_scale is not None:
        assert found.channel_scale.max() == 1
        directions = directions * found.channel_scale
    if found.offset_factor is not None:
        directions = directions + found.offset_factor[..., None] * found.channel_shift
    torch.testing.assert_close(directions, tokens.directions, rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("stored", STORED)
def test_a_gpu_trains_protobin_as_a_cpu_does(stored: str) -> None:
    losses, weights = [], []
    for device in ("cpu", "cuda"):
        probe = build_probe("protobin", ProbeShape(96, 5), {"dropout": 0.0})
        stack = TrialStack("protobin", probe, [Trial(1e-2, 1e-4, 0)] * 2, device=device)
        tokens = stored_tokens(stored, (8, 50, 96), [50, 1, 7, 50, 33, 2, 50, 49], device)
        assert (tokens.stored_directions is None) == (device == "cpu")
        targets = (torch.rand(8, 5, generator=torch.Generator().manual_seed(1)) < 0.3).float()
        for _ in range(3):
            losses.append(stack.step(tokens, targets.to(device), asymmetric, factor=1.0).cpu())
        weights.append(stack.weights_of(1))
    torch.testing.assert_close(torch.stack(losses[:3]), torch.stack(losses[3:]), rtol=2e-3, atol=0)
    difference = (weights[0]["weight"] - weights[1]["weight"]).abs()
    assert difference.mean() < 2e-3


@needs_triton
@pytest.mark.gpu
def test_no_similarity_of_all_patches_is_made_on_a_gpu() -> None:
    patches = torch.randn(16, 512, 256, dtype=torch.float16, device="cuda")
    tokens = Tokens(LayerTokens(patches), dtype=torch.float32, device=patches.device)
    prototypes = torch.randn(2048, 256, device="cuda", requires_grad=True)
    match_tokens(tokens, prototypes).sum().backward()  # what is tuned is tuned
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    match_tokens(tokens, prototypes).sum().backward()
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < 16 * 512 * 2048 * 2, "half of the similarities in float16"
