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
    """compile_for(kernel, its arguments' types and constants, backend, architecture, threads of a warp) -> assembly."""
    triton = pytest.importorskip("triton")
    backends = pytest.importorskip("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from quan.quantizer import lsq_triton

    def compiled(tile, arguments, *target):
        function, sizes = getattr(lsq_triton, tile), {"ROWS": 1, "COLUMNS": 4096}
        types = {**arguments, "rows": "i32", "columns": "i32", "tiles": "i32", "low": "fp32", "high": "fp32"}
        constants = {**{name: value for name, value in arguments.items() if not isinstance(value, str)}, **sizes}
        source = triton.compiler.ASTSource(
            function, {name: "constexpr" if name in constants else types[name] for name in function.arg_names}, constants)
        return triton.compile(source, backends.GPUTarget(*target), {"num_warps": lsq_triton.WARPS}).asm

    return compiled


GPUS = [("cuda", 75, 32), ("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx90a", 64), ("hip", "gfx942", 64)]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: str(gpu[1]))
def test_the_kernels_compile_for_gpus_that_are_not_here(compile_for, gpu):
    compile_for("quantize_tile", {"v": "*fp32", "steps": "*fp32", "q": "*bf16"}, *gpu)
    compile_for("differentiate_tile", {"grad": "*bf16", "v": "*fp32", "steps": "*fp32", "grad_v": "*fp32", "sums": "*fp32",
                                       "HAS_ERRORS": True}, *gpu)
    compile_for("differentiate_tile", {"grad": "*fp64", "v": "*fp64", "steps": "*fp64", "grad_v": None, "sums": "*fp64",
                                       "HAS_ERRORS": False}, *gpu)


def test_a_gpu_divides_and_rounds_as_a_cpu_does(compile_for):
    code = compile_for("quantize_tile", {"v": "*fp32", "steps": "*fp32", "q": "*bf16"}, "cuda", 90, 32)["ptx"]
    each = 4096 // 256  # values of a thread
    assert code.count("div.rn.f32") == each  # IEEE's division, which keeps what is denormal
    assert code.count("add.f32") + code.count("add.rn.f32") == 2 * each  # both of nearest(), neither left out nor fused
    assert ".ftz" not in code and "fma" not in code
    assert "min.f32" not in code and "max.f32" not in code  # they would make a number of what is none
    assert "cvt.rn.bf16" in code


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
