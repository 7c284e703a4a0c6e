"""The Triton kernels of LSQ, on machines without a GPU: what they compute, that they can be compiled, who chooses them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quan.quantizer import kernel, lsq
from util.errors import UserError

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.fixture(autouse=True)
def as_before():
    yield
    kernel.use("plain")


def test_the_kernels_compute_what_tensor_operations_compute():
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", CASES],
                          cwd=CASES.parents[1], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """compile_for(backend, architecture, threads of a warp) makes the launches of kernels, which keep their arguments as they
    are, compile them for a GPU that is not there; it returns a list that gets what is compiled."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from quan.quantizer import lsq_triton

    def compile_for(*target):
        device, compiled = 1000 + GPUS.index(target), []  # Triton remembers kernels by their devices
        monkeypatch.setattr(driver, "_active", SimpleNamespace(
            get_current_target=lambda: GPUTarget(*target), get_current_device=lambda: device,
            get_current_stream=lambda device: 0))
        for name, tile in tiles.items():
            monkeypatch.setattr(lsq_triton, name, Launches(lambda grid, tile=tile: lambda *arguments, **options: (
                compiled.append(tile.warmup(*arguments, grid=grid, **options)))))
        return compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = {name: getattr(lsq_triton, name) for name in ("quantize_tile", "differentiate_tiles", "add_up")}
    return compile_for


class Launches:
    """What is indexed by the number of programs gives what is called with a kernel's arguments."""

    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return self.launch(grid)


GPUS = [("cuda", 75, 32), ("cuda", 90, 32), ("hip", "gfx90a", 64), ("hip", "gfx942", 64)]
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: str(gpu[1]))
def test_the_kernels_compile_for_gpus_that_are_not_here(compile_for, gpu):
    """With their arguments as they are: Triton makes constants of ones, and 64-bit integers of large numbers."""
    from quan.quantizer import lsq_triton
    compiled = compile_for(*gpu)
    cases = [((4, 4096), (), FP32, BF16, True, False), ((64, 9), (64, 1), BF16, BF16, True, True),
             ((3, 9217), (3, 1), FP32, FP32, False, True), ((1,), (), FP64, FP64, True, True)]
    for shape, steps, v_type, type_, needs_v, has_errors in cases if gpu[1] == 90 else cases[:2]:
        v, steps = torch.ones(shape, dtype=v_type), torch.ones(steps, dtype=kernel.ARITHMETIC[v_type])
        rows, columns, grad_v = steps.numel(), v.numel() // steps.numel(), torch.empty_like(v) if needs_v else None
        lsq_triton.quantize(v, steps, rows, columns, 8, 7, v.to(type_))
        lsq_triton.differentiate(v.to(type_), v, steps, rows, columns, 8, 7, grad_v, 0.5, has_errors)
    assert len(compiled) == (12 if gpu[1] == 90 else 6) and all(code.asm for code in compiled)


def test_a_gpu_divides_and_rounds_as_a_cpu_does(compile_for):
    from quan.quantizer import lsq_triton
    compiled, v = compile_for("cuda", 90, 32), torch.ones(8192)
    lsq_triton.quantize(v, torch.ones(()), 1, 8192, 8, 7, v.bfloat16())
    code, each = compiled[0].asm["ptx"], lsq_triton.TILE // (32 * lsq_triton.WARPS)  # values of a thread
    assert code.count("div.rn.f32") == 1  # of the inverse, by IEEE's division, which keeps what is denormal
    assert code.count("fma.rn.f32") == 2 * each  # those that mend the product with it, and no other
    assert code.count("add.f32") + code.count("add.rn.f32") == 2 * each  # both of nearest(), neither left out nor fused
    assert ".ftz" not in code
    assert "min.f32" not in code and "max.f32" not in code  # they would make a number of what is none
    assert "cvt.rn.bf16" in code and "ld.global.v4.b32" in code  # to the nearest; 16 bytes at once


def test_triton_is_chosen_for_a_gpu_and_imported_for_nothing_else(monkeypatch):
    monkeypatch.delitem(sys.modules, "quan.quantizer.lsq_triton", raising=False)
    kernel.use("auto")
    assert "quan.quantizer.lsq_triton" not in sys.modules
    checks = []
    kernels = SimpleNamespace(check=lambda: checks.append(1), quantize=None, differentiate=None, QUANTIZE=[(1, 1)],
                              DIFFERENTIATE=[(1, 1)])
    monkeypatch.setitem(sys.modules, "quan.quantizer.lsq_triton", kernels)
    monkeypatch.setattr(sys.modules["quan.quantizer"], "lsq_triton", kernels, raising=False)
    for wanted in ("auto", "compiled"):
        kernel.use(wanted, "cuda")
        assert kernel.is_compiled() and kernel.describe() == "Triton kernels"
    assert len(checks) == 2
    assert not kernel.takes(torch.ones(2), torch.tensor(1.0))  # on the CPU, while a GPU computes
    kernel.use("plain", "cuda")
    assert not kernel.is_compiled() and kernel.describe() == "tensor operations"


@pytest.mark.parametrize("fails", ["no Triton", "no compiler"])
def test_without_triton_tensor_operations_take_over(monkeypatch, fails):
    def check():
        raise RuntimeError("Failed to find C compiler. Please specify via CC.\nand more")

    kernels = None if fails == "no Triton" else SimpleNamespace(check=check)
    monkeypatch.setitem(sys.modules, "quan.quantizer.lsq_triton", kernels)
    monkeypatch.delattr(sys.modules["quan.quantizer"], "lsq_triton", raising=False)
    if kernels:
        monkeypatch.setattr(sys.modules["quan.quantizer"], "lsq_triton", kernels, raising=False)
    kernel.use("auto", "cuda")
    named = "lsq_triton" if fails == "no Triton" else "Failed to find C compiler"
    assert not kernel.is_compiled() and kernel.describe().startswith("tensor operations (") and named in kernel.describe()
    with pytest.raises(UserError, match=f"^kernels: found compiled, but .*{named}.*; install Triton and a C compiler[^\n]*$"):
        kernel.use("compiled", "cuda")
    assert lsq(torch.tensor([0.9]), torch.tensor(0.5), 2, 1).item() == 0.5
