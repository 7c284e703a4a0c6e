"""How fast a packed network is on this machine, beside the same network without quantizers; and a table of its layers' times
for the search."""

import contextlib
import copy
import importlib.util
import itertools
import statistics
import time

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from engine.checkpoint import signedness_of
from engine.passes import keep_freed_memory, to_device
from engine.resume import create_dense
from integer_layer import CannotCompute, check_operators
from integer_network import computed, for_good, layers_of, to_integers
from model.names import put_modules
from network import build_network
from packed_file import PackedLayer, read_packed
from packed_network import CPU, as_checkpoint, check_own, load_any, rebuild
from quan.quantizer import LsqQuan, kernel
from quan.utils import weights_quantized_once
from schema import FinetuneConfig
from util.config import build
from util.errors import UserError
from util.exchange import write_atomically
from util.tables import aligned, csv_text

DENSE, FOLDED, FLOAT, INTEGER = "float32", "float32, BatchNorm folded", "packed, float", "packed, integer"
ONNX_DENSE, ONNX_PACKED, ONNX_INTEGER = "onnxruntime, float32", "onnxruntime, qdq", "onnxruntime, integer"
ROUNDS = 11
WHOLE = None  # stands for the whole network among names of layers
BITS = range(2, 9)  # that a policy may give
COLUMNS = ("layer", "weight_bits", "act_bits", "ms")
FIXED_PAIR = (8, 8)  # of layers that are not searched


def benchmark(path, batches, threads, arch=None):
    """Print the median time of each way to compute a network, in turn in one run: WAY, BATCH, MEDIAN ms, RATIO to float32."""
    prepare(threads)
    network = rebuild(as_checkpoint(read_packed(path)), path, arch)
    ways, remarks = all_ways(network, path)
    print(f"{path}: {network.config.arch}, images of {size_of(network)} pixels, {threads_in_use()}, medians of "
          f"{ROUNDS}, ratios to the network without quantizers\n" + "\n".join(remarks), flush=True)
    rows = [row for batch in batches for row in measure(ways, images_for(network, batch))]
    print(aligned(("way", "batch", "ms", "ratio"), rows, 2))


def speed(path, batch, threads=None):
    """How many times faster a packed network is computed, with integers where that can be, than without quantizers."""
    prepare(threads)
    network = rebuild(as_checkpoint(read_packed(path)), path)
    ways = {DENSE: unquantized(network), INTEGER: computed(network, "auto", path)[0]}
    return measure(ways, images_for(network, batch))[1]["ratio"]


def threads_in_use():
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)}"


def prepare(threads):
    """Compute as training and evaluation do by default."""
    if threads:
        torch.set_num_threads(threads)
    kernel.use("auto")
    keep_freed_memory()


def size_of(network):
    return network.description["input_size"]


def images_for(network, batch):
    """Random images, laid out as evaluation has them."""
    images = torch.randn(batch, 3, size_of(network), size_of(network), generator=torch.Generator().manual_seed(0))
    return images if network.graph.contiguous else images.to(memory_format=torch.channels_last)


def all_ways(network, path):
    """({way: function of images}, lines of remarks) of a PolicyNetwork in evaluation mode."""
    dense = unquantized(network)
    integer, how = computed(network, "auto", path)
    ways = {DENSE: dense, FOLDED: folded(network, dense), FLOAT: network.model, INTEGER: integer}
    remarks = [f"{INTEGER}: {how}"]
    if ways[FOLDED] is None:
        del ways[FOLDED]
    found, why = in_onnxruntime(network, dense)
    return ways | found, remarks + why


def unquantized(network):
    """The network as it was before anything was quantized; of its weights, the values do not matter here."""
    model, graph, _ = create_dense(network.config.arch, network.description["num_classes"], size_of(network))
    return to_device(model.eval().requires_grad_(False), CPU, graph)


def folded(network, dense):
    """The same with each BatchNorm folded into the convolution before it; None where there is nothing to fold."""
    pairs = {name: layer for name, layer in network.graph.batchnorms.items()
             if layer is not None and name not in network.graph.indirect
             and type(dense.get_submodule(name)) is nn.BatchNorm2d and isinstance(dense.get_submodule(layer), nn.Conv2d)}
    if not pairs:
        return None
    twin = copy.deepcopy(dense)
    put_modules(twin, {layer: fuse_conv_bn_eval(twin.get_submodule(layer), twin.get_submodule(name))
                       for name, layer in pairs.items()} | {name: nn.Identity() for name in pairs})
    return to_device(twin, CPU, network.graph).requires_grad_(False)


def in_onnxruntime(network, dense):
    """({way: function of images} of the exported networks, lines that say why there are not all of them)."""
    from onnx_export import NEEDED, narrowest_that_loads, to_onnx
    from onnx_integer import to_integer_onnx

    size, ways, remarks = size_of(network), {}, []
    models = {ONNX_DENSE: lambda: to_onnx(dense, size),
              ONNX_PACKED: lambda: narrowest_that_loads(to_onnx(network.model, size))[0],
              ONNX_INTEGER: lambda: to_integer_onnx(network.model, images_for(network, 1).contiguous())[0]}
    if any(importlib.util.find_spec(package) is None for package in NEEDED["--onnx"]):
        return {}, ["onnxruntime: not measured; pip install -r requirements-export.txt"]
    for way, export in models.items():
        try:
            ways[way] = _runner(export().SerializeToString(), images_for(network, 1))
        except UserError as error:
            remarks.append(f"{way}: not measured; {error}")
    return ways, remarks


def _runner(data, images):
    """A function of images that onnxruntime computes; a UserError where it does not compute these."""
    from onnx_export import logits_of_onnxruntime, session

    logits_of_onnxruntime(data, images.contiguous())
    loaded = session(data)
    return lambda images: loaded.run(None, {"images": images.contiguous().numpy()})


@torch.inference_mode()
def measure(ways, images, rounds=None, clock=time.perf_counter):
    """A row for each way, {way, batch, ms: the median, ratio: how many times faster than the first one}."""
    times = {way: [] for way in ways}
    with contextlib.ExitStack() as stack:
        for function in ways.values():
            if isinstance(function, nn.Module):
                stack.enter_context(weights_quantized_once(function))
            function(images)
        for _ in range(rounds or ROUNDS):
            for way, function in ways.items():
                begun = clock()
                function(images)
                times[way].append(1e3 * (clock() - begun))
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    first = next(iter(medians.values()))
    return [{"way": way, "batch": len(images), "ms": ms, "ratio": first / ms} for way, ms in medians.items()]


# ---------------------------------------------------------------------------------------------------------------------
# The table of times for the search.


def write_latency_table(path, table, batch, threads, arch=None):
    """Time each layer of the network in a file, a checkpoint of stage 1 or 3 or a packed one, and write the times in ms at
    every pair of bit-widths as search.py --latency reads them.

    With oneDNN all pairs at which a layer is computed with integers take the same time, and all others that of float32. The
    time of all that is no layer stands in the row of the first fixed layer, so that a policy's times add up to the network's.
    """
    prepare(threads)
    content = load_any(path)
    network = fresh(content, path, arch)
    images = images_for(network, batch)
    integer, floats = _integer(network)
    in_float = for_good(network.model, size_of(network), layers_of(network.model))
    (fast, whole), (slow, _) = (layer_times(model, network.graph.layers, images) for model in (integer, in_float))
    searched, rows = network.metadata["weight_bits"], {}
    for name, call in network.graph.layers.items():
        for pair in itertools.product(BITS, BITS) if name in searched else [FIXED_PAIR]:
            row = PackedLayer(call.kind, call.shape, pair[0], True, pair[1], True, True, 0)
            rows[name, *pair] = slow[name] if row.why_float or name in floats else fast[name]
    fixed = next((name for name in network.graph.layers if name not in searched), None)
    if fixed is not None:
        rows[fixed, *FIXED_PAIR] += max(whole - sum(fast.values()), 0)
    lines = [dict(zip(COLUMNS, (*key, f"{ms:.4f}"), strict=True)) for key, ms in rows.items()]
    write_atomically(table, csv_text(COLUMNS, lines).encode())
    rest = "in no row, as no layer is fixed" if fixed is None else f"in the row of {fixed}"
    print(f"{table}: {len(searched)} searched layers at {len(BITS) ** 2} pairs of bit-widths, batch {batch}, "
          f"{threads_in_use()}; what is no layer is {rest}")
    if "weight_bits" in content:
        print(compare_with_prediction(content, path, arch, rows, images))


def fresh(content, path, arch):
    """The PolicyNetwork of a file at 4 bits, where integers fit, with steps and statistics of random images; of its weights,
    the values do not matter here."""
    if not {"arch", "config", "num_classes", "input_size"} <= content.keys():
        raise UserError(f"{path}: does not say which network it holds; give a checkpoint of this project, or a packed file")
    check_own(content, path, arch)
    config = build(FinetuneConfig, {"arch": arch or content["arch"], "quan": content["config"]["quan"], "weight_bits": 4,
                                    "act_bits": 4}, {"": path})
    network = build_network(config, content["num_classes"], content["input_size"], None, CPU)
    for name, signed in signedness_of(content).items():
        if isinstance(network.model.get_submodule(name).quan_a_fn, LsqQuan):
            network.model.get_submodule(name).quan_a_fn.signed = signed
    with torch.no_grad():
        network.model.train()(images_for(network, 2))
    network.model.eval()
    return network


def _integer(network):
    try:
        check_operators()
        return to_integers(network.model, size_of(network))
    except CannotCompute as error:
        raise UserError(f"--latency-table: {error}") from None


@torch.inference_mode()
def layer_times(model, names, images, rounds=None, clock=time.perf_counter):
    """({layer: median ms}, median ms of the whole network)."""
    current, rows = {}, []  # seconds in one pass, of a layer that is called several times in all
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: current.update({name: current[name] - clock()}))
        module.register_forward_hook(lambda *_, name=name: current.update({name: current[name] + clock()}))
    for _ in range((rounds or ROUNDS) + 1):
        current.update(dict.fromkeys(names, 0.0))
        begun = clock()
        model(images)
        rows.append({**current, WHOLE: clock() - begun})
    medians = {name: 1e3 * statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    return medians, medians.pop(WHOLE)


def compare_with_prediction(content, path, arch, rows, images):
    """A line: what the table says of the policy in a file, and what its network takes."""
    network = rebuild(content, path, arch)
    weight_bits, act_bits = network.metadata["weight_bits"], network.metadata["act_bits"]
    predicted = sum(ms for (name, *pair), ms in rows.items()
                    if name not in weight_bits or pair == [weight_bits[name], act_bits[name]])
    integer, _ = computed(network, "auto", path)
    [row] = measure({INTEGER: integer}, images)
    return f"{path} at its own bits: {predicted:.2f} ms by the table, {row['ms']:.2f} ms measured"
