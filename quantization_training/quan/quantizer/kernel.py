"""Who computes LSQ: compiled loops on the CPU (lsq.cpp), Triton kernels on a GPU (lsq_triton.py), or tensor operations.

The loops need a C++ compiler with OpenMP. They are compiled once for each machine, in about a second, and kept in
~/.cache/limpqp (or under $XDG_CACHE_HOME).
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from util.errors import UserError, reason
from util.exchange import CHECKSUM_LENGTH, checksum, write_atomically

SOURCE = Path(__file__).with_name("lsq.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
COMPILE_SECONDS = 120
NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16"}
ARITHMETIC = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32,
              torch.float16: torch.float32}
QUANTIZE = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16)]  # (type of v, type of the result)
DIFFERENTIATE = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                 (torch.bfloat16, torch.bfloat16)]  # (type of the gradient that comes in, type of v)
POINTER, COUNT, BOUND, THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int

CPU = "cpu"

_quantize, _differentiate = {}, {}  # functions for tensors on _device, by types; empty where there are none
_count = {}  # the one that gives integers
_device, _state = CPU, "tensor operations"


def use(wanted, device=CPU):
    """Choose how LSQ is computed.

    Args:
        wanted: "auto" (compiled where that can be had), "compiled" or "plain" (tensor operations).
        device: the type of the device that is computed on, "cpu" or "cuda" (ROCm's, too); on the other one LSQ is computed by
            tensor operations.

    Raises:
        UserError: where "compiled" cannot be had.
    """
    global _device, _state
    _quantize.clear()
    _differentiate.clear()
    _count.clear()
    _device, _state = device, "tensor operations"
    if wanted == "plain":
        return
    try:
        _state = _take_loops() if device == CPU else _take_triton()
    except (OSError, AttributeError, subprocess.SubprocessError, _NoTriton) as error:
        _quantize.clear()
        _differentiate.clear()
        if wanted == "compiled":
            needed = ("a C++ compiler with OpenMP (or name it in CXX)" if device == CPU else
                      "Triton and a C compiler (or name that in CC)")
            raise UserError(f"kernels: found compiled, but {reason(error)}; install {needed}, or give auto or plain") from None
        _state = f"tensor operations ({reason(error)[:160]})"


def is_compiled():
    return bool(_quantize)


def describe():
    """How LSQ is computed, in words."""
    return _state


def takes(v, steps):
    """Whether compiled functions can quantize v with these steps: one for all, or one for each entry along the first axis."""
    return (is_compiled() and type(v) in (torch.Tensor, torch.nn.Parameter) and v.device.type == _device
            and steps.device == v.device and ARITHMETIC.get(v.dtype) == steps.dtype and v.layout == torch.strided
            and (steps.numel() == 1 or (v.dim() == steps.dim() and steps.numel() == steps.shape[0] == v.shape[0])))


def quantize(v, steps, qn, qp, dtype):
    """round(clip(v/s, -qn, qp)) * s as a new tensor of type `dtype`; None where there is no function for these types."""
    function = _quantize.get((v.dtype, dtype))
    if function is None:
        return None
    v, steps = _dense(v), steps.contiguous()
    q = torch.empty_like(v, dtype=dtype)
    function(v, steps, steps.numel(), v.numel() // max(steps.numel(), 1), qn, qp, q)
    return q


def integers(v, step, qn, qp):
    """round(clip(v/step, -qn, qp)) + qn as a new uint8 tensor, of one step size; None where there is no function for it."""
    function = _count.get(v.dtype)
    if function is None or step.numel() != 1:
        return None
    v = _dense(v)
    q = torch.empty_like(v, dtype=torch.uint8)
    function(v.data_ptr(), step.data_ptr(), v.numel(), qn, qp, torch.get_num_threads(), q.data_ptr())
    return q


def differentiate(grad, v, steps, qn, qp, scale, needs_v, may_overwrite, changes=None):
    """The gradients of quantize(), as lsq.gradients() gives them, with the same arguments; None where there is no function for
    these types."""
    function = _differentiate.get((grad.dtype, v.dtype))
    if function is None:
        return None
    assert grad.shape == v.shape and grad.device == v.device
    v, steps = _dense(v), steps.contiguous()
    if not _lies_as(grad, v):
        grad, may_overwrite = torch.empty_like(v, dtype=grad.dtype).copy_(grad), True
    grad_v = None
    if needs_v:
        grad_v = grad if may_overwrite and grad.dtype == v.dtype else torch.empty_like(v)
    grad_s, errors = function(grad, v, steps, steps.numel(), v.numel() // max(steps.numel(), 1), qn, qp, grad_v, scale,
                              changes is not None)
    if changes is not None:
        changes.append(errors.view(()) if errors.numel() == 1 else errors.sum())
    return grad_v, grad_s.view(steps.shape)


def _lies_as(one, other):
    """Whether the values of two tensors of one shape lie in memory in the same way; a stride over one value says nothing."""
    return all(size == 1 or a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True))


def _dense(tensor):
    """The tensor itself where its values lie one after the other, the first axis outermost; else such a copy."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous()


class _NoTriton(Exception):
    """Why Triton does not compute here."""


def _take_triton():
    """Take the kernels for the current GPU; return their name."""
    try:
        from . import lsq_triton  # Triton is not there on every machine

        lsq_triton.check()
    except Exception as error:  # Triton has many types of them, for compilers that it does not find, and GPUs that it lacks
        raise _NoTriton(reason(error)) from None
    _quantize.update(dict.fromkeys(lsq_triton.QUANTIZE, lsq_triton.quantize))
    _differentiate.update(dict.fromkeys(lsq_triton.DIFFERENTIATE, lsq_triton.differentiate))
    return "Triton kernels"


def _take_loops():
    """Take the loops over lsq.cpp; return their name."""
    library = _load()
    for name, functions, pairs, loops, read, written in (("quantize", _quantize, QUANTIZE, _quantize_by_loops, 2, 1),
                                                         ("differentiate", _differentiate, DIFFERENTIATE,
                                                          _differentiate_by_loops, 3, 3)):
        for pair in pairs:
            function = getattr(library, "_".join([name, *map(NAMES.get, pair)]))
            function.argtypes = [POINTER] * read + [COUNT, COUNT, BOUND, BOUND, THREADS] + [POINTER] * written
            function.restype = None
            functions[pair] = functools.partial(loops, function)
    function = _count[torch.float32] = library.integers_float32_uint8
    function.argtypes, function.restype = [POINTER, POINTER, COUNT, BOUND, BOUND, THREADS, POINTER], None
    return "compiled loops"


def _quantize_by_loops(function, v, steps, rows, columns, qn, qp, q):
    function(v.data_ptr(), steps.data_ptr(), rows, columns, qn, qp, torch.get_num_threads(), q.data_ptr())


def _differentiate_by_loops(function, grad, v, steps, rows, columns, qn, qp, grad_v, scale, has_errors):
    """As lsq_triton.differentiate() says."""
    sums, clipped = torch.empty(2, rows, dtype=torch.float64)
    function(grad.data_ptr(), v.data_ptr(), steps.data_ptr(), rows, columns, qn, qp, torch.get_num_threads(),
             None if grad_v is None else grad_v.data_ptr(), sums.data_ptr(), clipped.data_ptr())
    return sums.to(steps.dtype) * scale, (sums - clipped) * steps.flatten() if has_errors else None


def _load():
    """The compiled library: from the cache, or compiled now."""
    command = find_compiler()
    if not command:
        raise OSError("no C++ compiler is found")
    # What is compiled for one processor may not run on another one that shares the home directory.
    version = subprocess.run([*command, "--version"], capture_output=True, timeout=COMPILE_SECONDS, check=True).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), " ".join(FLAGS).encode(), version, _processor()])).hexdigest()[:16]
    target = _cache() / f"lsq_{key}.so"
    if _is_whole(target):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(target))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as elsewhere:
        compiled = Path(elsewhere) / target.name
        done = subprocess.run([*command, *FLAGS, "-o", str(compiled), str(SOURCE)], capture_output=True, text=True,
                              errors="replace", timeout=COMPILE_SECONDS, check=False)
        if done.returncode:
            raise OSError(f"{shlex.join(command)} cannot compile {SOURCE.name} ({reason(done.stderr)})")
        with contextlib.suppress(OSError, UserError):
            _keep(compiled, target)
        try:
            return ctypes.CDLL(str(compiled))  # a loaded library outlives its file
        except OSError:  # from some disks for temporary files nothing may be executed
            if not _is_whole(target):
                raise
            return ctypes.CDLL(str(target))


def _cache():
    """The folder that compiled files are kept in; one that cannot be written where it is not known whose home it is."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limpqp"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(os.devnull) / "limpqp"


def _keep(compiled, target):
    """Put a compiled file into the cache, with its checksum, whole at every moment, whatever other processes do."""
    own, code = f"{target}.{os.getpid()}", compiled.read_bytes()
    write_atomically(own, code + checksum(code))
    os.replace(own, target)


def _is_whole(path):
    """Whether a file lies in the cache as _keep wrote it; code from one that was cut off would end the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content[-CHECKSUM_LENGTH:] == checksum(content[:-CHECKSUM_LENGTH])


def find_compiler():
    """The command that compiles C++, as a list of words; empty where none is found."""
    if os.environ.get("CXX"):
        try:
            return shlex.split(os.environ["CXX"])
        except ValueError as error:
            raise OSError(f"CXX is no command ({error})") from None
    return [path for path in map(shutil.which, COMPILERS) if path][:1]


def _processor():
    """What tells processors apart that do not know the same instructions."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(sorted({line for line in lines if line.lower().startswith((b"flags", b"features"))}))
    return f"{platform.machine()} {platform.processor()}".encode()
