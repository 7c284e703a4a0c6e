"""How fast packed networks compute with integers, and what memory they take, beside the same networks without quantizers.

cd quantization_training && python ../measurements/bench_inference.py [--threads N] [--output FILE.csv]

Weights are random, and bits 4: neither changes the times. The memory of a way is measured in processes of their own, the
median of three: its weights, and by how much the resident set grows while it computes. Linux only.
"""

import ctypes
import gc
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, ".")
import benchmark
from integer_layer import IntegerLayer
from quan.quantizer import kernel
from timing import show
from util.command import Parser
from util.errors import user_errors_on_one_line

CASES = {"resnet50": 224, "mobilenet_v2": 224, "vit_tiny_patch16_224": 224}
BATCHES = (1, 16)
COLUMNS = ("network", "batch", "threads", "way", "ms", "ratio", "peak_mb")
CLASSES = 1000


def network_of(arch):
    content = {"arch": arch, "config": {"quan": {}}, "num_classes": CLASSES, "input_size": CASES[arch]}
    return benchmark.fresh(content, arch, None)


def rows_of(arch):
    """Times and memory of one network."""
    print(f"{arch} ...", file=sys.stderr, flush=True)
    ways, _ = benchmark.all_ways(network_of(arch), arch)
    for batch in BATCHES:
        for row in benchmark.measure(ways, benchmark.images_for(network_of(arch), batch)):
            peak = {}
            if row["way"] in (benchmark.DENSE, benchmark.INTEGER):
                command = [sys.executable, __file__, "--peak", arch, row["way"], str(batch)]
                found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
                peak["peak_mb"] = statistics.median(map(float, found))
            yield {"network": arch, "threads": torch.get_num_threads(), **row, **peak}


def status(key):
    """A size of this process in MB, as Linux says it."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) / 1024


def peak_mb(arch, way, batch):
    """MB of a way's weights, and by how much the resident set grows while it computes a batch, after a first one."""
    torch.set_num_threads(1)
    kernel.use("auto")
    torch.nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8)).sum().backward()
    network = network_of(arch)
    images = benchmark.images_for(network, batch)
    model = benchmark.unquantized(network) if way == benchmark.DENSE else benchmark.computed(network, "integer", arch)[0]
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + sum(
        call.params for name, call in network.graph.layers.items() if isinstance(model.get_submodule(name), IntegerLayer))
    del network
    with torch.inference_mode():
        model(images)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    with torch.inference_mode():
        model(images)
    return weights / 2**20 + status("VmHWM") - before


def main(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--output", default="results/bench_inference.csv")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--peak", nargs=3, metavar=("ARCH", "WAY", "BATCH"))
    options = parser.parse_args(arguments)
    if options.peak:
        arch, way, batch = options.peak
        print(peak_mb(arch, way, int(batch)))
        return
    benchmark.prepare(options.threads)
    show(options.output, COLUMNS, [row for arch in CASES for row in rows_of(arch)], digits=2)


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
