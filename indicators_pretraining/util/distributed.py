"""Ranks, devices and seeds: the one module that knows whether a run has one process or several."""

import contextlib
import os
import random

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from util.errors import Lost, UserError, as_user_error, reason

CONNECTION = ("connection closed", "connection reset", "broken pipe", "connection refused", "socket", "recv", "timed out")
ERROR_KEY = "limpqp/error"
_control = None  # the group of processes that small numbers on the CPU travel in


def is_distributed():
    return dist.is_initialized()


def rank():
    return dist.get_rank() if is_distributed() else 0


def world_size():
    return dist.get_world_size() if is_distributed() else 1


def is_main():
    return rank() == 0


def barrier():
    if is_distributed():
        dist.barrier()


@contextlib.contextmanager
def process_group(training_device):
    """Join the processes that torchrun or torch.distributed.launch started, if any; yield this process's device.

    Args:
        training_device: "auto" (a GPU where there is one), "gpu" or "cpu".
    """
    device = _device(training_device)
    if "WORLD_SIZE" not in os.environ or "MASTER_ADDR" not in os.environ:
        yield device
        return
    global _control
    _control = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **_meeting_place())
        _control = dist.new_group(backend="gloo")
    else:
        dist.init_process_group("gloo", **_meeting_place())
    try:
        with one_process_tells():
            yield device
            leave_process_group()
    finally:
        if is_distributed():  # an error: the other ranks may be gone, so nothing is waited for
            dist.destroy_process_group()


def _meeting_place():
    """Where the processes of a launcher find each other: the arguments of init_process_group, anew for each restart.

    Where torchrun keeps its store over restarts, it holds addresses of processes that are gone; to wait for one of these takes
    half an hour. Its agents on several machines count restarts differently, and one that is new does not find the others.

    Raises:
        UserError: where torchrun on several machines is to restart processes and keeps its store, and where no launcher set
            the environment.
    """
    environment = os.environ
    keeps_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if keeps_store and environment.get("GROUP_WORLD_SIZE", "1") != "1" and restarts:
        raise UserError("--max-restarts: over several machines torchrun restarts processes only where "
                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 stands in its environment; set it on each machine, or leave "
                        "--max-restarts out")
    try:
        own, processes = int(environment.get("RANK", -1)), int(environment["WORLD_SIZE"])
        if not 0 <= own < processes:  # it would wait for half an hour
            raise ValueError(f"RANK is {environment.get('RANK', 'missing')}, WORLD_SIZE {processes}")
        store, *_ = next(rendezvous("env://"))
    except (ValueError, RuntimeError) as error:  # of numbers, or of the connection
        raise UserError(f"WORLD_SIZE and MASTER_ADDR are set in the environment, but other processes cannot be met "
                        f"({reason(error)[:120]}); start with torchrun, or unset both to compute in one process") from None
    if keeps_store:
        store = dist.PrefixStore(f"start_{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return {"store": store, "rank": own, "world_size": processes}


@contextlib.contextmanager
def one_process_tells():
    """Mark a UserError that another rank tells; say the loss of another process as Lost."""
    try:
        yield
    except Exception as error:
        mended = as_user_error(error)
        if mended is not None:
            mended.is_told = not _tells(str(mended))
            raise mended from None
        if not isinstance(error, RuntimeError) or not any(word in str(error).lower() for word in CONNECTION):
            raise
        raise Lost("" if _is_told() else f"error: rank {rank()} lost another process of the run ({reason(error)[:120]})") \
            from None


def _tells(message):
    """Whether this rank is the first to meet an error, or meets another one than the first."""
    first = None
    with contextlib.suppress(Exception):  # the store may be gone with its process; an error told twice is better than none
        first = dist.distributed_c10d._get_default_store().compare_set(ERROR_KEY, "", f"{rank()}:{message}").decode()
    return first is None or first.startswith(f"{rank()}:") or first.partition(":")[2] != message


def _is_told():
    """Whether any rank has told an error."""
    with contextlib.suppress(Exception):  # as above
        return dist.distributed_c10d._get_default_store().check([ERROR_KEY])
    return False


def largest_over_ranks(number):
    """The largest of the whole numbers that the ranks give, on every rank."""
    return begin_largest_over_ranks(lambda: number)()


def begin_largest_over_ranks(number_of):
    """Begin to find the largest of the whole numbers that number_of() gives on the ranks, and return what waits for it. Read
    a step later, it waits for no rank that is less than a step behind. A single process asks number_of() when it is read."""
    if world_size() == 1:
        return number_of
    tensor = torch.tensor([number_of()])
    work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_control, async_op=True)

    def largest():
        work.wait()
        return int(tensor)
    return largest


def set_threads(wanted, recorded=None):
    """Choose how many threads each process computes with: `wanted`, or else `recorded`, those that the run had before, where
    the machine has so many; or else all. A launcher of several processes sets OMP_NUM_THREADS=1; they share the cores instead.
    """
    cores = os.cpu_count() or 1
    if wanted is None and recorded is not None and recorded <= cores:
        wanted = recorded
    if wanted is None and world_size() > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        wanted = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
    if wanted is not None:
        torch.set_num_threads(wanted)


def leave_process_group():
    """End the work of this rank together with the others."""
    dist.barrier()  # a thread of gloo that frees a tensor of Python's after the interpreter has ended would abort the process
    dist.destroy_process_group()


def _device(wanted):
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("training_device: found gpu, but this machine has no CUDA device; use auto or cpu")
    local_rank, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= devices:
        raise UserError(f"--nproc_per_node: more processes than the {devices} GPUs of this machine")
    return torch.device("cuda", local_rank)


def describe_device(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def set_seed(seed, deterministic=False):
    """Seed every generator; ranks differ, so that dropout does. `deterministic` picks repeatable GPU kernels."""
    random.seed(seed + rank())
    np.random.seed((seed + rank()) % 2**32)
    torch.manual_seed(seed + rank())
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # one more operation for each tensor that is made


def random_states():
    """The state of every rank's generators, [{'torch': bytes tensor, 'cuda': ..., 'python': ..., 'numpy': ...}]."""
    version, internal, next_gauss = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    own = {"torch": torch.get_rng_state(), "python": [version, list(internal), next_gauss],
           "numpy": [kind, keys.tolist(), position, has_gauss, gauss]}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    return gather_objects(own)


def set_random_states(states):
    """Put this rank's generators into the state that random_states() found."""
    if len(states) != world_size():
        return  # another number of processes draws anew
    own = states[rank()]
    torch.set_rng_state(own["torch"])
    version, internal, gauss = own["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = own["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])


def gather_objects(value):
    """What every rank holds, in the order of ranks."""
    if not is_distributed():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor):
    """The sum of a tensor over ranks, on every rank."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor):
    """The mean of a tensor over ranks, on every rank, in its place."""
    return sum_over_ranks(tensor).div_(world_size()) if is_distributed() else tensor


def average_tensors(tensors):
    """Replace tensors by their mean over ranks, in place, in one reduction per type."""
    if not is_distributed():
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = mean_over_ranks(torch.cat([tensor.reshape(-1) for tensor in group]))
        for tensor, mean in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def average_gradients(parameters):
    """Average gradients over ranks; all ranks have them for the same parameters."""
    average_tensors([parameter.grad for parameter in parameters if parameter.grad is not None])


def average_batchnorm_statistics(model):
    """Average the running statistics of every BatchNorm over ranks."""
    average_tensors([buffer for _, buffer in _batchnorm_buffers(model) if buffer.is_floating_point()])


def batchnorm_statistics(model):
    """Running statistics of every BatchNorm on each rank, [{name: tensor on the CPU}]; they differ inside an epoch."""
    if not is_distributed():
        return []
    return gather_objects({name: buffer.cpu() for name, buffer in _batchnorm_buffers(model)})


def set_batchnorm_statistics(model, statistics):
    """Put back what batchnorm_statistics gave; another number of ranks keeps what it has."""
    if len(statistics) == world_size():
        for name, buffer in _batchnorm_buffers(model):
            buffer.copy_(statistics[rank()][name])


def _batchnorm_buffers(model):
    return [(f"{name}.{entry}", buffer) for name, module in model.named_modules()
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for entry, buffer in module.named_buffers()]


def broadcast_model(model):
    """Give every rank the parameters and buffers of rank 0."""
    if is_distributed():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def on_main(function, *arguments):
    """Call a function on rank 0 alone and give every rank its result, or its UserError."""
    if not is_distributed():
        return function(*arguments)
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = function(*arguments)
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
