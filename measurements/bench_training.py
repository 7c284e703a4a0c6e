"""What quantization costs in time and memory, next to a reference implementation and to the network without quantizers.

In indicators_pretraining: python ../measurements/bench_training.py [--output FILE.csv] [--only CASE ...] [--rounds N] [--tiny]

All sides of a comparison run in turn in one process, on buffers already touched; medians are printed, and ratios. The
reference, `plain chain`, is what published LSQ code computes (divide, clamp, round with a straight-through gradient,
multiply); the `floor` is the network without quantizers in the default memory layout, as many passes and one optimizer step.
Memory is the peak of what tensors take during a step, on a GPU what the process has taken from it. On a GPU, in at most 5
minutes: bytes per second of the quantizers, the kernels that take the most, and steps of several networks beside their floor,
in the same precision and channels last. A case that fails is named in its note, and the others go on.
"""

import gc
import itertools
import operator
import os
import socket
import statistics
import sys
import time
from functools import cached_property, partial

sys.path.insert(0, ".")  # the stage, also in the processes that this one starts

import torch
from torch import nn

import process
from engine.loop import training_step
from engine.metrics import Metrics
from engine.passes import Passes, keep_freed_memory, to_device
from engine.plots import new_figure, save_figure
from model import create_model
from model.layer_table import trace
from quan.bit_switch import BitSwitch
from quan.config import ExceptionConfig, QuanConfig
from quan.quantizer import LsqQuan, Quantizer, kernel, lsq
from quan.quantizer.lsq import gradients, quantized
from quan.utils import joint_modules, policy_modules, replace_module_by_names, searchable_layers, weights_quantized_once
from timing import show, timed
from util import distributed
from util.command import Parser
from util.data_loader import CROP_PADDING, CropAndFlip, normalise
from util.errors import UserError, nearest, reason, user_errors_on_one_line
from util.tables import aligned

BITS = (6, 5, 4, 3, 2)
EXCEPTS = {"mobilenetv1": ("stem.0", "stem.1", "fc"), "mobilenet_v2": ("features.0.0", "features.0.1", "classifier.1"),
           "vit_b_16": ("conv_proj", "heads.head")}
USUAL_EXCEPTS = ("conv1", "bn1", "fc")
CLASSES = 1000
COLUMNS = ("case", "what", "side", "ms", "peak_mb", "time_over_floor", "time_over_chain", "memory_over_floor",
           "memory_over_chain", "note")
FULL_PRECISION, REFERENCE = "floor", "plain chain"  # sides, as the rows name them
OVER = {FULL_PRECISION: "floor", REFERENCE: "chain"}  # in the names of columns
MB = 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Measuring.


class Clock:
    """Times and memory of callables on a device."""

    def __init__(self, device, rounds):
        self.device, self.rounds = device, rounds

    def milliseconds(self, work):
        self.wait()
        return 1e3 * timed(lambda: (work(), self.wait()))[0]

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def in_turn(self, sides, before=lambda side: None):
        """{side: median milliseconds} of {side: callable}, each called twice before, then one after the other.

        Args:
            before: called with the side each time before its callable; this is not measured.
        """
        for side, work in sides.items():
            before(side)
            work()
            work()
        times = {side: [] for side in sides}
        for _ in range(self.rounds):
            for side, work in sides.items():
                before(side)
                times[side].append(self.milliseconds(work))
        return {side: statistics.median(values) for side, values in times.items()}

    def forget_peak(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def taken(self):
        """The most bytes that this process has taken from the GPU since forget_peak(), with what lies in them unused; 0 on a
        CPU."""
        return torch.cuda.max_memory_reserved() if self.device.type == "cuda" else 0

    def peak(self, work):
        """The most bytes that tensors made by a callable take at a time."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        events = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events()
                        if event.name() == "[memory]")
        return max(itertools.accumulate((size for _, size in events), initial=0))


def table(clock, case, what, sides, kept=0, notes=None, before=lambda side: None):
    """Rows of a comparison.

    Args:
        sides: {side: callable}; the others are compared with FULL_PRECISION and REFERENCE.
        kept: bytes that lie in memory all the while, such as parameters and their momentum.
        before: called with a side each time before it is measured.
    """
    print(f"{case}: {what} ...", file=sys.stderr, flush=True)
    times, peaks = clock.in_turn(sides, before), {}
    for side, work in sides.items():
        before(side)
        peaks[side] = (clock.peak(work) + kept) / MB
    rows = [{"case": case, "what": what, "side": side, "ms": times[side], "peak_mb": peaks[side],
             "note": (notes or {}).get(side, "")} for side in sides]
    for row in rows:
        for other, name in OVER.items():
            if other in sides:
                row[f"time_over_{name}"] = row["ms"] / times[other]
                row[f"memory_over_{name}"] = row["peak_mb"] / peaks[other]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What is compared.


def reference_lsq(v, s, qn, qp, scale):
    s = (s - s * scale).detach() + s * scale
    clipped = (v / s).clamp(-qn, qp)
    return ((clipped.round() - clipped).detach() + clipped) * s


class ReferenceQuan(Quantizer):
    """The step sizes of an LsqQuan, used by reference_lsq."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def select(self, bit):
        self.inner.select(bit)

    def forward(self, x):
        self.inner.observe(x)
        return reference_lsq(x, *self.inner.quantization_parameters(x))


class Workload:
    """A batch, and networks of one architecture that take a training step on it.

    Args:
        device, arch, batch, size: where, what, how many images and of how many pixels on a side.
    """

    def __init__(self, device, arch, batch, size):
        self.device, self.arch, self.size = device, arch, size
        self.config = QuanConfig(excepts={name: ExceptionConfig() for name in EXCEPTS.get(arch, USUAL_EXCEPTS)})
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(batch, 3, size, size, generator=generator).to(device)
        self.target = torch.randint(CLASSES, (batch,), generator=generator).to(device)

    def model(self):
        torch.manual_seed(0)
        return create_model(self.arch, CLASSES)

    @cached_property
    def graph(self):
        return trace(self.model(), self.size, CLASSES)

    def on_device(self, model, chain):
        """The model in training, laid out as ours, or with quantizers and layout of the reference."""
        model.train()
        if not chain:
            return to_device(model, self.device)
        quantizers = {name: module for name, module in model.named_modules() if isinstance(module, LsqQuan)}
        replace_module_by_names(model, {name: ReferenceQuan(module) for name, module in quantizers.items()})
        return model.to(self.device)

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def full_precision(self, passes, precision="fp32", channels_last=False):
        """Forward and backward passes of the network without quantizers, and one optimizer step."""
        model = self.on_device(self.model(), chain=not channels_last)
        optimizer, computing = self.optimizer(model), Passes(model, precision)

        def step():
            optimizer.zero_grad(set_to_none=True)
            for _ in range(passes):
                nn.functional.cross_entropy(computing.logits(self.images), self.target).backward()
            optimizer.step()
        return step

    def joint(self, bits=BITS, chain=False, precision="fp32", recorded=True):
        """A step of joint training."""
        model, graph = self.model(), self.graph
        replace_module_by_names(model, joint_modules(model, graph, self.config, bits))
        switch = BitSwitch(model, graph, self.config.excepts, bits)
        self.on_device(model, chain)
        optimizer, passes = self.optimizer(model), Passes(model, precision, recorded and not chain)
        layers, steps = list(switch.layers), itertools.count()

        def step():
            chosen = process.random_policy(layers, bits, 0, 0, next(steps))
            process.joint_step(model, switch, self.images, self.target, nn.functional.cross_entropy, optimizer, chosen,
                               passes=passes)
        return step

    def tuned(self, chain=False, precision="fp32", recorded=True):
        """A step of fine-tuning at 4 bits."""
        model = self.on_device(self.tuned_model(), chain)
        optimizer, metrics = self.optimizer(model), Metrics(self.device)
        passes = Passes(model, precision, recorded and not chain)

        def criterion(logits, images, target):
            return nn.functional.cross_entropy(logits, target)
        return lambda: training_step(model, [(self.images, self.target)], criterion, optimizer, metrics, passes)

    def tuned_model(self):
        model, graph = self.model(), self.graph
        bits = dict.fromkeys(searchable_layers(graph, self.config.excepts), 4)
        return replace_module_by_names(model, policy_modules(model, graph, self.config, bits, bits, {}, graph.classifiers))

    def kept(self):
        """Bytes of the parameters with their momentum."""
        return 2 * 4 * sum(parameter.numel() for parameter in self.model().parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The cases.


def quantizer(clock):
    """Forward and backward of one quantizer, and what it keeps between them."""
    x = torch.randn(16, 256, 56, 56, generator=torch.Generator().manual_seed(0)).relu_()
    incoming, qp = torch.ones_like(x), 15
    scale = (x.numel() * qp) ** -0.5
    functions = {REFERENCE: reference_lsq, FULL_PRECISION: torch.compile(reference_lsq), "not compiled": lsq, "compiled": lsq}

    def side(function):
        leaf, step = x.clone().requires_grad_(), torch.tensor(0.3).requires_grad_()

        def work():
            leaf.grad = step.grad = None
            function(leaf, step, 0, qp, scale).backward(incoming)
        return work

    notes = {name: f"keeps {kept_bytes(function, x, qp, scale) / x.nbytes:.2f}x its input"
             for name, function in functions.items() if name != FULL_PRECISION}
    rows = table(clock, "quantizer", "16x256x56x56, unsigned 4 bits",
                 {name: side(function) for name, function in functions.items()},
                 before=lambda name: kernel.use("plain" if name == "not compiled" else "auto"),
                 notes={FULL_PRECISION: "the chain through torch.compile", **notes})
    kernel.use("auto")
    return rows


def kept_bytes(function, x, qp, scale):
    """Bytes that a function of (v, s, qn, qp, scale) keeps for its backward pass."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(x.clone().requires_grad_(), torch.tensor(0.3).requires_grad_(), 0, qp, scale)
    return sum(storages.values())


def sides_of(work, step, passes):
    """A step in float32 and bfloat16, as the reference computes it, and without quantizers."""
    return {FULL_PRECISION: work.full_precision(passes),
            "floor, channels last": work.full_precision(passes, channels_last=True),
            "floor, bfloat16": work.full_precision(passes, "bf16", channels_last=True),
            REFERENCE: step(chain=True), "float32": step(), "bfloat16": step(precision="bf16")}


def joint(clock):
    """A step of joint training, against six passes of the network without quantizers."""
    work = Workload(clock.device, "resnet18", 16, 128)
    return table(clock, "joint step", "ResNet-18, batch 16 at 128x128, bits 6 5 4 3 2",
                 sides_of(work, work.joint, len(BITS) + 1), work.kept())


def finetuning(clock):
    """A step of fine-tuning, against the network without quantizers."""
    work = Workload(clock.device, "resnet50", 8, 224)
    return table(clock, "fine-tuning step", "ResNet-50, batch 8 at 224x224, W4A4", sides_of(work, work.tuned, 1), work.kept())


def scaling(clock):
    """How a joint step compares with as many passes, by batch size, by number of candidates, by network."""
    cases = [("batch", batch, "resnet18", batch, 64, BITS) for batch in (1, 4, 16, 64)]
    cases += [("candidates", count, "resnet18", 16, 64, tuple(range(count + 1, 1, -1))) for count in range(2, 8)]
    cases += [("network", arch, arch, 4, 96, BITS) for arch in ("resnet18", "resnet50", "mobilenetv1")]
    rows, clock = [], Clock(clock.device, min(3, clock.rounds))
    for kind, value, arch, batch, size, bits in cases:
        work = Workload(clock.device, arch, batch, size)
        rows += table(clock, f"scaling, {kind}", str(value),
                      {FULL_PRECISION: work.full_precision(len(bits) + 1), "float32": work.joint(bits)}, work.kept())
    return rows


def evaluation(clock):
    """Evaluation with weights quantized once, against quantizing them for each batch."""
    work = Workload(clock.device, "resnet50", 8, 64)
    model = to_device(work.tuned_model(), clock.device).eval()

    def evaluate(context):
        with torch.no_grad(), context:
            for _ in range(8):
                model(work.images)

    sides = {"each batch": lambda: evaluate(torch.no_grad()), "once": lambda: evaluate(weights_quantized_once(model))}
    return table(clock, "evaluation", "ResNet-50, 8 batches of 8 at 64x64, weights quantized", sides)


def augmentation(clock):
    """Random crops and flips of 32x32 images, normalised."""
    images = torch.randint(256, (10_000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crop = CropAndFlip(0, len(images), 32 // CROP_PADDING, True, torch.device("cpu"))
    scale, shift = torch.full((2, 1, 3, 1, 1), 0.5)

    def epoch():
        for indices in torch.arange(len(images)).split(128):
            normalise(crop(images[indices], 0, indices), scale, shift)

    [row] = table(clock, "augmentation", "32x32 colour images in batches of 128", {"one epoch of 10,000": epoch})
    return [{**row, "note": f"{len(images) / row['ms'] * 1e3:,.0f} images a second"}]


def processes(clock):
    """A joint step over two processes of one thread each, against one process of two threads with the same images."""
    rows = []
    for count in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        results = torch.multiprocessing.get_context("spawn").SimpleQueue()
        torch.multiprocessing.spawn(one_process, (count, port, clock.rounds, results), nprocs=count)
        milliseconds, reductions = results.get()
        rows.append({"case": "processes", "what": "ResNet-18, 16 images at 128x128 in all", "side": f"{count} of {2 // count} "
                     "threads", "ms": milliseconds, "note": f"{reductions} reductions of gradients per step"})
    return rows


def one_process(rank, count, port, rounds, results):
    torch.set_num_threads(2 // count)
    kernel.use("auto")
    keep_freed_memory()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    reductions = []
    with distributed.process_group("cpu") as device:
        step = Workload(device, "resnet18", 16 // count, 128).joint()
        milliseconds = Clock(device, rounds).in_turn({"step": step})["step"]
        reduce = torch.distributed.all_reduce
        torch.distributed.all_reduce = lambda *words, **options: reductions.append(1) or reduce(*words, **options)
        step()
        torch.distributed.all_reduce = reduce
    if rank == 0:
        results.put((milliseconds, len(reductions)))


# (architecture, batch, pixels on a side), what matters most first; and the same where a test runs all this without a GPU.
GPU_NETWORKS = (("resnet50", 128, 224), ("resnet18", 16, 32), ("mobilenet_v2", 128, 224), ("vit_b_16", 64, 224),
                ("resnet50", 256, 224))
TINY_NETWORKS = (("resnet20", 2, 8),)
GPU_SECONDS = 240  # of the table, whose last side may take a while
REPEATS = 10  # of a kernel between two looks at the clock
STEPS_BEFORE = 2  # and two of in_turn(): by then passes are recorded as CUDA graphs
OURS, ONE_BY_ONE = "ours", "ours, cuda_graphs: false"


def gpu(clock, networks=GPU_NETWORKS):
    """Steps on a GPU in float32 and bfloat16: the floor lies channels last and has the same precision."""
    rows, end = [], time.monotonic() + GPU_SECONDS
    for arch, batch, size in networks:
        work = Workload(clock.device, arch, batch, size)
        steps = {"fine-tuning, W4A4": (work.tuned, 1), f"joint, {' '.join(map(str, BITS))}": (work.joint, len(BITS) + 1)}
        for (kind, (step, passes)), precision in itertools.product(steps.items(), ("bf16", "fp32")):
            ours = partial(step, precision=precision)
            sides = {FULL_PRECISION: partial(work.full_precision, passes, precision, True), OURS: ours,
                     ONE_BY_ONE: partial(ours, recorded=False), REFERENCE: partial(ours, chain=True)}
            found = {side: gpu_side(clock, side, make, work.kept(), end) for side, make in sides.items()}
            for side, row in found.items():
                row.update(case=f"GPU, {kind}", what=f"{arch}, batch {batch} at {size}x{size}, {precision}", side=side)
                for other, name in OVER.items():
                    if "ms" in row and "ms" in found[other]:
                        row[f"time_over_{name}"] = row["ms"] / found[other]["ms"]
                        row[f"memory_over_{name}"] = row["peak_mb"] / found[other]["peak_mb"]
            rows += found.values()
            print(aligned(COLUMNS, list(found.values()), 2), flush=True)
    return rows


def gpu_side(clock, side, make, kept, end):
    """Time and memory of the step that make() gives, or a note why there are none."""
    if time.monotonic() > end:
        return {"note": f"not measured: the {GPU_SECONDS} seconds are over"}
    try:
        clock.forget_peak()
        step = make()
        for _ in range(STEPS_BEFORE):
            step()
        return {"ms": clock.in_turn({side: step})[side], "peak_mb": (clock.taken() or clock.peak(step) + kept) / MB,
                "note": kernel.describe() if side == OURS else ""}
    except Exception as error:  # such as a lack of memory, of which torch and drivers have many types
        return {"note": failure(error)}
    finally:
        step = None
        gc.collect()  # modules and their hooks may hold each other
        torch.cuda.empty_cache()


def failure(error):
    return f"{type(error).__name__}: {reason(error)[:100]}"


def expensive(clock, networks=GPU_NETWORKS[:2]):
    """The ten kernels (on a CPU, operations) that take the most of our joint step in bfloat16, and how many are launched."""
    rows, kind = [], torch.autograd.DeviceType.CUDA if clock.device.type == "cuda" else torch.autograd.DeviceType.CPU
    taken = operator.attrgetter("self_device_time_total" if clock.device.type == "cuda" else "self_cpu_time_total")
    for arch, batch, size in networks:
        step = Workload(clock.device, arch, batch, size).joint(precision="bf16")
        for _ in range(STEPS_BEFORE + 2):
            step()
        clock.wait()
        with torch.profiler.profile() as profile:
            step()
            clock.wait()
        events = sorted((event for event in profile.key_averages() if event.device_type == kind), key=taken, reverse=True)
        total, case = sum(map(taken, events)), f"kernels of a joint step, {arch}, batch {batch} at {size}x{size}, bf16"
        rows.append({"case": case, "what": "all", "ms": total / 1e3, "note": f"{sum(e.count for e in events)} launches"})
        rows += [{"case": case, "what": event.key[:60], "ms": taken(event) / 1e3,
                  "note": f"{100 * taken(event) / total:.1f} %, {event.count} launches"} for event in events[:10]]
    return rows


def bandwidth(clock, shape=(128, 256, 56, 56)):
    """GB/s of the quantizer's two kernels, and of a copy of as many bytes as are read or written forward."""
    rows, step = [], torch.tensor(0.3, device=clock.device)
    for dtype in (torch.bfloat16, torch.float32):
        v = torch.randn(shape, device=clock.device).to(dtype)
        grad, other = torch.randn_like(v), torch.empty_like(v)
        sides = {"copy": (lambda v=v, other=other: other.copy_(v), 2), "forward": (lambda v=v: quantized(v, step, 8, 7), 2),
                 "backward": (lambda v=v, grad=grad: gradients(grad, v, step, 8, 7), 3)}
        times = clock.in_turn({side: lambda work=work: [work() for _ in range(REPEATS)] for side, (work, _) in sides.items()})
        times = {side: milliseconds / REPEATS for side, milliseconds in times.items()}
        rates = {side: count * v.nbytes / times[side] / 1e6 for side, (_, count) in sides.items()}
        rows += [{"case": "quantizer kernels", "what": f"{'x'.join(map(str, shape))}, {str(dtype)[6:]}", "side": side,
                  "ms": times[side], "note": f"{rate:,.0f} GB/s, {100 * rate / rates['copy']:.0f} % of a copy"}
                 for side, rate in rates.items()]
    return rows


CASES = {function.__name__: function for function in (quantizer, joint, finetuning, evaluation, augmentation, processes,
                                                      scaling)}
GPU_CASES = {function.__name__: function for function in (bandwidth, expensive, gpu)}
TINY_CASES = {"bandwidth": partial(bandwidth, shape=(2, 4, 5, 5)), "expensive": partial(expensive, networks=TINY_NETWORKS),
              "gpu": partial(gpu, networks=TINY_NETWORKS)}


# ---------------------------------------------------------------------------------------------------------------------
# Showing.


def draw(path, rows):
    """Draw the ratios to full precision into a PNG file: bars for each case, lines for how they grow."""
    rows = [row for row in rows if row.get("time_over_floor") and row["side"] != FULL_PRECISION]
    bars = [row for row in rows if not row["case"].startswith("scaling, ")]
    grown = {kind: found for kind in ("batch", "candidates", "network")
             if (found := [row for row in rows if row["case"] == f"scaling, {kind}"])}
    if not rows:
        return
    height = max(4, 0.25 * len(bars)) + 3 * bool(grown and bars)
    figure = new_figure("time and memory over the network without quantizers", (12, height))
    parts = figure.subfigures(bool(bars) + bool(grown), 1, squeeze=False).flatten()
    if bars:
        draw_bars(parts[0].subplots(1, 2, sharey=True), bars)
    if grown:
        for axes, kind in zip(parts[-1].subplots(1, len(grown), squeeze=False).flatten(), grown, strict=True):
            draw_growth(axes, kind, grown[kind])
    save_figure(figure, path)


def draw_bars(panels, rows):
    has_one = len({(row["case"], row["side"]) for row in rows}) == len(rows)
    names = [f"{row['case'] if has_one else row['case'] + ', ' + row['what']}: {row['side']}" for row in rows]
    for axes, key, title in zip(panels, ("time_over_floor", "memory_over_floor"), ("time", "peak memory"), strict=True):
        colours = ["0.6" if row["side"].startswith((REFERENCE, FULL_PRECISION)) else "tab:blue" for row in rows]
        bars = axes.barh(names, [row[key] for row in rows], color=colours)
        axes.bar_label(bars, fmt=" {:.2f}", fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()  # the axis is shared


def draw_growth(axes, kind, rows):
    for key, name in (("time_over_floor", "time"), ("memory_over_floor", "peak memory")):
        axes.plot([row["what"] for row in rows], [row[key] for row in rows], marker="o",
                  linestyle="" if kind == "network" else "-", label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel({"batch": "batch size", "candidates": "number of candidates", "network": ""}[kind])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def rows_of(case, name, clock):
    """The rows of a case, or one that says what it failed of."""
    try:
        return case(clock)
    except Exception as error:  # whatever it is, the other cases are still worth their time
        return [{"case": name, "note": failure(error)}]


def main(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--output", default="results/bench.csv", help="the table; the plot stands beside it")
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"some of {', '.join([*CASES, *GPU_CASES])}")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is measured")
    parser.add_argument("--tiny", action="store_true", help="the cases of a GPU, on any machine, on tiny networks")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = TINY_CASES if options.tiny else CASES if device.type == "cpu" else GPU_CASES
    for name in options.only or ():
        if name not in cases:
            raise UserError(f"--only: found {name}, allowed on this machine is {', '.join(cases)}{nearest(name, cases)}")
    if options.rounds < 1:
        raise UserError(f"--rounds: found {options.rounds}, allowed is at least 1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's remarks on what it does not find
    kernel.use("auto", device.type)
    keep_freed_memory()
    clock = Clock(device, options.rounds)
    print(f"{distributed.describe_device(device)}, torch {torch.__version__}, quantizers by {kernel.describe()}")
    rows = [row for name in options.only or cases for row in rows_of(cases[name], name, clock)]
    draw(os.path.splitext(options.output)[0] + ".png", rows)
    show(options.output, COLUMNS, rows, digits=2)


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
