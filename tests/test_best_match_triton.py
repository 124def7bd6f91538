"""The GPU kernel: interpreted and compiled without a GPU, run on one with -m gpu."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

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


POINTERS = {"prototypes": "fp16", "counts": "i32", "winner_out": "i32", "winners": "i32"}
NUMBERS = ("n_prototypes", "n_clips")
BLOCK = ("PROTOTYPES", "PATCHES", "DIMS")


def compiled(
    name: str, constants: dict[str, int], pointers: dict[str, str], **options: int
) -> CompiledKernel:
    """A kernel for an H100, which need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from patchbank.probing.probes import best_match_triton

    kernel = getattr(best_match_triton, name)
    constants = {"n_patches": 512, "dim": 768, **constants}
    signature = {
        name: "constexpr"
        if name in constants
        else "i32"
        if name in NUMBERS
        else f"*{(POINTERS | pointers).get(name, 'fp32')}"
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@needs_triton
@pytest.mark.parametrize(
    ("stored", "compared"), [("fp16", "fp16"), ("i8", "fp16"), ("bf16", "fp32"), ("fp32", "fp32")]
)
def test_the_kernel_compiles_for_a_gpu_that_is_not_there(stored: str, compared: str) -> None:
    """Down to the machine code of an H100, which says whether tensor cores do the products."""
    from patchbank.probing.probes.best_match_triton import SIZES

    *block, n_stages, n_warps = SIZES[-1]
    kernel = compiled(
        "_match_kernel",
        {"HAS_OFFSET": stored == "i8", **dict(zip(BLOCK, block, strict=True))},
        {"tokens": stored, "prototypes": compared},
        num_stages=n_stages,
        num_warps=n_warps,
    )
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 227 * 1024
    assert products_of_32_bits(kernel) == []


def products_of_32_bits(kernel: CompiledKernel) -> list[str]:
    """Lines that multiply places: 32 bits end at 2^31 numbers, 2.8 million prototypes of 768."""
    return re.findall(r"arith\.muli .*tensor<\S*xi32>", kernel.asm["ttir"])


@needs_triton
def test_the_gradient_compiles_once_for_batches_of_any_size() -> None:
    from patchbank.probing.probes.best_match_triton import GRADIENT_BLOCK, _gradient_kernel

    kernel = compiled("_gradient_kernel", GRADIENT_BLOCK, {"tokens": "i8"})
    assert products_of_32_bits(kernel) == []
    [n_clips] = [one for one in _gradient_kernel.params if one.name == "n_clips"]
    assert not n_clips.is_constexpr
    assert n_clips.do_not_specialize


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is always the current one")
def test_tokens_of_another_gpu_than_the_current_one_are_matched_there() -> None:
    tokens = stored_tokens("float16", (2, 40, 16), None, "cuda:1")
    random = torch.Generator().manual_seed(0)
    prototypes = torch.randn(20, 16, generator=random).to("cuda:1").requires_grad_()
    with torch.cuda.device(0):
        best = match_tokens(tokens, prototypes)
        best.sum().backward()
    expected = (tokens.directions @ prototypes.T).amax(dim=1)
    torch.testing.assert_close(best, expected, rtol=0, atol=2e-3)
    assert prototypes.grad is not None


BROKEN = {
    "cannot be imported": (
        "raise OSError('libtriton.so: wrong ELF class')",
        "OSError: libtriton.so: wrong ELF class",
    ),
    "has no compiler": (
        """
        from types import SimpleNamespace
        class Kernel:
            def __getitem__(self, grid):
                def launch(*arguments, **constants):
                    raise RuntimeError("Failed to find C compiler.")
                return launch
        knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=True))
        def jit(function=None, **options):
            return Kernel() if function else jit_with
        def jit_with(function):
            return Kernel()
        def cdiv(one, other):
            return -(-one // other)
        """,
        "RuntimeError: Failed to find C compiler.",
    ),
}
ASK = """
import torch
from patchbank.probing.batch import LayerTokens
from patchbank.probing.probes.stored_directions import why_no_kernel
from patchbank.probing.probes.tokens import Tokens

print(why_no_kernel())
tokens = Tokens(LayerTokens(torch.ones(1, 2, 3)), dtype=torch.float32, device=torch.device("cuda"))
print(tokens.stored_directions if why_no_kernel() else "the kernel")
"""


def asked(**environment: str) -> list[str]:
    """What a process of its own says: the reason, and which directions tokens of a GPU have."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ASK],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_triton_that_does_not_work_leaves_plain_torch_and_says_why(
    tmp_path: Path, source: str, reason: str
) -> None:
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text(dedent(source))
    (package / "language.py").write_text("constexpr = int")
    assert asked(PYTHONPATH=str(tmp_path)) == [reason, "None"]


@needs_triton
def test_a_triton_that_works_is_tried_once() -> None:
    assert asked(TRITON_INTERPRET="1") == ["None", "the kernel"]


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
