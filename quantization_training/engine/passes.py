"""How the passes of a training step are computed: in which numbers, in which memory layout, recorded or not."""

import contextlib
import ctypes
import types

import torch
from torch import nn

from model.layer_table import convolve_pixels, skips_pixels
from quan.quantizer import kernel
from util import distributed
from util.errors import UserError, reason

from .graphs import GraphedPasses

# mallopt(3): M_TRIM_THRESHOLD off, M_TOP_PAD in bytes, M_MMAP_MAX none, as numbered in glibc's malloc.h
GLIBC_KEEPS = {-1: -1, -2: 2**26, -4: 0}


def prepare(config, recorded_threads, device):
    """Choose with how many threads (those of a run that is continued, or None), and how, this process computes, beforehand."""
    distributed.set_threads(config.threads, recorded_threads)
    kernel.use(config.kernels, device.type)
    if config.keep_freed_memory:
        keep_freed_memory()


def prepare_alone(config, command, device):
    """The same for a command that computes in one process, with the seed of the configuration."""
    if distributed.world_size() > 1:
        raise UserError(f"--nproc_per_node: {command} computes in one process")
    distributed.set_seed(config.seed, config.dataloader.deterministic)
    prepare(config, None, device)


def keep_freed_memory():
    """Let the C library, where it is glibc, keep memory that was freed: a step takes the same large tensors again and again,
    and to fill pages that come back empty costs more than to quantize what lies in them."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in GLIBC_KEEPS.items():
            mallopt(parameter, value)


def to_device(model, device, graph=None):
    """Move a network, laid out as convolutions compute it fastest: channels last; contiguous where its graph says so.

    On a CPU, strided 1x1 convolutions of few channels compute the pixels that they look at (see skips_pixels). A network
    that changes its images in place gets a copy of them: other passes, and a teacher, look at the same ones.
    """
    if graph and graph.changes_images:
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))
    for module in model.modules() if device.type == "cpu" else ():
        if (isinstance(module, nn.Conv2d) and type(module)._conv_forward is nn.Conv2d._conv_forward
                and skips_pixels(module.kernel_size, module.stride, module.groups, module.in_channels)):
            module._conv_forward = types.MethodType(convolve_pixels, module)
    return model.to(device, memory_format=torch.preserve_format if graph and graph.contiguous else torch.channels_last)


class Passes:
    """The forward passes of a network in training, in precision "fp32" or "bf16"; recorded: on a GPU as CUDA graphs."""

    def __init__(self, model, precision="fp32", recorded=False):
        self.model, self.precision = model, precision
        self.graphed, self.remark = None, ""
        if recorded and any(parameter.is_cuda for parameter in model.parameters() if parameter.requires_grad):
            self.begin_recording()

    def begin_recording(self):
        try:
            self.graphed = GraphedPasses(self.model, self.compute)
        except Exception as error:  # of torch, some of whose builds and allocators have no pools of memory
            self.remark = f"passes are not recorded as CUDA graphs: {reason(error)[:160]}"

    def logits(self, images):
        """The logits, [batch, classes], in the type of its loss: float32 where it computes in less."""
        return self.compute(images) if self.graphed is None else self.graphed.logits(images)

    def compute(self, images):
        # bfloat16 holds the integers of every candidate; step sizes and their gradients stay in float32.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model(images)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def log_to(self, log):
        """Say by log(line) whether passes are recorded."""
        if self.graphed is not None:
            self.graphed.log = log
        elif self.remark:
            log(self.remark)
