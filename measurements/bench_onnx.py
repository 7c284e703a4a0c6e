"""How fast exported networks are in onnxruntime, on one thread: from the folder quantization_training,

python ../measurements/bench_onnx.py [--tiny | --classes CHECKPOINT...]

The network without quantizers (onnxruntime folds its BatchNorms), `--profile qdq` and `--profile integer`, in turn in one run,
at W4A4 with random weights, on which times do not depend. Writes measurements/onnx_times.csv. --tiny: small images, and no
file, to see that it runs. --classes: how many images of its test set each fine-tuned network puts into the class that PyTorch
does, with `--profile integer`; writes measurements/onnx_classes.csv.
"""

import sys
from pathlib import Path

sys.path.insert(0, ".")  # the stage

import torch

from benchmark import ONNX_DENSE, ONNX_INTEGER, ONNX_PACKED, images_for, in_onnxruntime, measure, prepare, unquantized
from network import build_network
from onnx_export import logits_of_onnxruntime
from onnx_integer import to_integer_onnx
from packed_network import CPU, load_any, rebuild, recorded_config
from schema import FinetuneConfig
from timing import show
from util.command import Parser
from util.data_loader import create_loaders
from util.errors import UserError, user_errors_on_one_line

NETWORKS = {"resnet50": 224, "resnet18": 224, "mobilenet_v2": 224, "resnet20": 32, "vit_tiny_patch4_32": 32}
BATCHES = 1, 16


def times(arch, size, batches):
    torch.manual_seed(0)
    network = build_network(FinetuneConfig(arch=arch, weight_bits=4, act_bits=4), 1000, size, None, CPU)
    network.model.train()(images_for(network, 4))  # step sizes and statistics
    network.model.eval()
    ways, missing = in_onnxruntime(network, unquantized(network))
    if missing:
        raise UserError("; ".join(missing))
    for batch in batches:
        ms = {row["way"]: row["ms"] for row in measure(ways, images_for(network, batch))}
        yield {"network": arch, "pixels": size, "batch": batch, "float32_ms": ms[ONNX_DENSE],
               "qdq_over_float32": ms[ONNX_PACKED] / ms[ONNX_DENSE], "integer_over_float32": ms[ONNX_INTEGER] / ms[ONNX_DENSE]}


def classes(path):
    content = load_any(path)
    network = rebuild(content, path)
    loaders = create_loaders(recorded_config(content, path).dataloader, 0, 0, 1, CPU, evaluation_only=True)
    images, labels = map(torch.cat, zip(*loaders.test, strict=True))
    graph, _, error = to_integer_onnx(network.model, images[:4])
    with torch.inference_mode():
        expected = network.model(images).argmax(1)
    found = logits_of_onnxruntime(graph.SerializeToString(), images).argmax(1)
    return {"network": network.config.arch, "run": Path(path).parent.name, "images": len(images),
            "same_class": (found == expected).sum().item(), "right_in_pytorch": (expected == labels).sum().item(),
            "right_in_onnxruntime": (found == labels).sum().item(), "largest_bias_error": error}


def main(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--classes", nargs="+", metavar="CHECKPOINT")
    options = parser.parse_args(arguments)
    prepare(threads=1)
    if options.classes:
        rows = [classes(path) for path in options.classes]
        show(Path(__file__).with_name("onnx_classes.csv"), list(rows[0]), rows, 4)
        return
    if options.tiny:
        print(*times("resnet20", 16, [1, 2]), sep="\n")
        return
    rows = [row for arch, size in NETWORKS.items() for row in times(arch, size, BATCHES)]
    show(Path(__file__).with_name("onnx_times.csv"), list(rows[0]), rows, 3)


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
