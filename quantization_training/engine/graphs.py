"""Passes of training as CUDA graphs.

A GPU computes most networks faster than Python can ask it to. What one pass asks of it, forward and backward, is recorded
therefore, once for each choice of bit-widths that comes again, and from then on started as a whole. A choice that comes only
once, such as that of the random pass, is computed as ever, and takes its memory from the same pool, in which each pass
overwrites what the one before has left. A recorded pass computes the same numbers: the same kernels, in the same order.
"""

import contextlib
import operator
import random
import warnings

import numpy as np
import torch

from quan.func import SwitchableBatchNorm
from quan.quantizer import LsqQuan
from util.errors import UserError, reason

MOST_RECORDED, MOST_REMEMBERED = 16, 256  # passes; choices that have come up
SYNCHRONIZES = "synchronizing CUDA operation"  # in torch's warning


class GraphedPasses:
    """Forward and backward passes of a network on a GPU, recorded where they come again.

    Gradients are added up in tensors that stay where they are, and that the parameters get as their `grad`.

    Args:
        compute: gives the logits of images, [batch, classes].

    Attributes:
        log: called with a line that says whether passes are recorded.
    """

    def __init__(self, model, compute):
        self.compute, self.log = compute, lambda line: None
        self.modules = list(model.modules())
        self.quantizers = [module for module in self.modules if isinstance(module, LsqQuan)]
        self.switched = [module for module in self.modules if isinstance(module, (LsqQuan, SwitchableBatchNorm))]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sums = {}  # {parameter: the tensor in which its gradients are added up}
        self.met, self.recorded, self.is_refused = {}, {}, False
        self.open = None  # the pass whose gradients have not been asked for
        self.gpu = Gpu()
        self.anchor = torch.zeros((), device=self.parameters[0].device, requires_grad=True)  # so that gradients are asked for

    def logits(self, images):
        return _Pass.apply(self.anchor, images, self)

    def start(self, images):
        """Compute the logits; what is returned has them, and adds up the gradients when it is finished."""
        choice = self.choice(images)
        self.open = self.recorded.get(choice) or self.record(choice, images) or _PlainPass(self)
        self.open.start(images)
        return self.open

    def choice(self, images):
        """What decides which operations a pass consists of, and on what memory."""
        return (images.shape, images.dtype, images.stride(), *(module.index for module in self.switched),
                *(quantizer.changes is None for quantizer in self.quantizers), *(p.data_ptr() for p in self.parameters))

    def record(self, choice, images):
        """Record a pass that comes for the third time, after one that was watched; else return None."""
        if self.is_refused or not all(quantizer.is_initialized for quantizer in self.quantizers):
            return None
        if len(self.met) >= MOST_REMEMBERED:
            self.met.clear()
        self.met[choice] = self.met.get(choice, 0) + 1
        if self.met[choice] == 2:
            return _WatchedPass(self)
        if self.met[choice] < 3 or len(self.recorded) == MOST_RECORDED:
            return None
        if not self.recorded:
            self.log("passes are recorded as CUDA graphs")
        self.recorded[choice] = _RecordedPass(self, images)
        return self.recorded[choice]

    def refuse(self, why):
        """Go on without recording."""
        if not self.is_refused:
            self.log(f"passes are not recorded as CUDA graphs: {why}")
        self.is_refused = True

    def gradients(self, logits, grad):
        """[(parameter, its gradient)] from the gradient of the logits, of the parameters that had a part in them."""
        gradients = torch.autograd.grad(logits, self.parameters, grad, allow_unused=True)
        return [(parameter, new) for parameter, new in zip(self.parameters, gradients, strict=True) if new is not None]

    def add(self, found):
        """Add gradients, [(parameter, gradient)], to those of passes before."""
        for parameter, new in found:
            if parameter not in self.sums:
                self.sums[parameter] = torch.zeros_like(new)
        self.take_sums([parameter for parameter, _ in found])
        self.add_to_sums(found)

    def take_sums(self, parameters):
        """Let these parameters have their sums as gradients, zero where a parameter had none."""
        fresh = []
        for parameter in parameters:
            total = self.sums[parameter]
            if parameter.grad is None:
                fresh.append(total)
            elif parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = total
        if fresh:
            torch._foreach_zero_(fresh)

    def add_to_sums(self, found):
        torch._foreach_add_([self.sums[parameter] for parameter, _ in found], [new for _, new in found])


class _Pass(torch.autograd.Function):
    """A pass, whose gradients go to the parameters and not to whom autograd would give them."""

    @staticmethod
    def forward(ctx, anchor, images, passes):
        ctx.passes, ctx.started = passes, passes.start(images)
        return ctx.started.logits.clone()

    @staticmethod
    def backward(ctx, grad):
        passes, started = ctx.passes, ctx.started
        if passes.open is not started:
            raise RuntimeError("the gradients of a pass are to be computed before the next pass")
        passes.open = None
        started.finish(grad)
        return None, None, None


class _PlainPass:
    """One that is not recorded."""

    def __init__(self, passes):
        self.passes = passes

    def start(self, images):
        with self.passes.gpu.within(), torch.enable_grad():
            self.outputs = self.passes.compute(images)
        self.logits = self.outputs.detach()

    def finish(self, grad):
        with self.passes.gpu.within():
            found = self.passes.gradients(self.outputs, grad)
        self.passes.add(found)
        self.outputs = self.logits = None


class _WatchedPass(_PlainPass):
    """A plain one, with an eye on what cannot be recorded, or would be computed otherwise when it is played back."""

    def start(self, images):
        self.watch(super().start, images)

    def finish(self, grad):
        self.watch(super().finish, grad)

    def watch(self, function, argument):
        generators, numbers, buffers = _states_of_generators(), _numbers(self.passes.modules), _buffers(self.passes.modules)
        with warnings.catch_warnings(record=True) as caught, self.passes.gpu.warns_of_waiting():
            warnings.simplefilter("always")
            function(argument)
        shown = {}  # so that Python leaves out, as ever, what comes again from other layers
        for warning in caught:
            if SYNCHRONIZES in str(warning.message):
                self.passes.refuse("the network waits for numbers from the GPU in its passes")
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno, registry=shown)
        if _states_of_generators() != generators:
            self.passes.refuse("the network draws random numbers on the CPU in its passes")
        if _numbers(self.passes.modules) != numbers:
            self.passes.refuse("the network changes numbers of its modules in its passes")
        if not all(map(operator.is_, _buffers(self.passes.modules), buffers)):
            self.passes.refuse("the network replaces buffers in its passes, which are to be changed in place")


class _RecordedPass:
    """A pass as two CUDA graphs, of its forward and its backward part."""

    def __init__(self, passes, images):
        self.passes, self.images = passes, images.clone()
        try:
            self.play_forward = passes.gpu.record(self.forward)
            self.grad = torch.empty_like(self.logits)
            self.play_backward = passes.gpu.record(self.backward)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of CUDA, or of torch's part in the recording
            raise UserError(f"cuda_graphs: the passes of this network cannot be recorded ({reason(error)[:160]}); "
                            "give cuda_graphs: false") from None
        self.outputs = None  # what it kept for the backward part is the graphs' alone

    def forward(self):
        with torch.enable_grad():
            self.outputs = self.passes.compute(self.images)
        self.logits = self.outputs.detach()

    def backward(self):
        quantizers = [quantizer for quantizer in self.passes.quantizers if quantizer.changes is not None]
        before = [len(quantizer.changes) for quantizer in quantizers]
        found = self.passes.gradients(self.outputs, self.grad)
        self.parameters = [parameter for parameter, _ in found]
        self.passes.add_to_sums(found)
        self.changes = [(quantizer, quantizer.changes[count:]) for quantizer, count in zip(quantizers, before, strict=True)]
        for quantizer, count in zip(quantizers, before, strict=True):
            del quantizer.changes[count:]

    def start(self, images):
        self.images.copy_(images)
        self.play_forward()

    def finish(self, grad):
        self.grad.copy_(grad)
        self.passes.take_sums(self.parameters)
        self.play_backward()
        for quantizer, changes in self.changes:
            quantizer.changes.extend(changes)


def _states_of_generators():
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()


def _numbers(modules):
    """What modules may count in Python, and compute with in the next pass."""
    return [{name: value for name, value in vars(module).items() if isinstance(value, (int, float))} for module in modules]


def _buffers(modules):
    return [buffer for module in modules for buffer in module._buffers.values()]


class Gpu:
    """Where passes are computed: on a stream of their own, since the default one cannot be recorded, in memory of a pool of
    their own. Memory that was used on one stream is given to no other one."""

    def __init__(self):
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()

    @contextlib.contextmanager
    def within(self):
        """What this thread asks for in this context is computed there, after what was asked for before."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            yield
        current.wait_stream(self.stream)

    @contextlib.contextmanager
    def warns_of_waiting(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is new, and does not see all
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def record(self, function):
        """Record what a function asks of the GPU, which it does not do yet; what is returned lets it do that."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, which read images or watch over other processes, may go on.
        with torch.cuda.graph(graph, pool=self.pool.id, stream=self.stream, capture_error_mode="thread_local"):
            function()
        return graph.replay
