"""How fast exported networks are in onnxruntime, on one thread: from the folder quantization_training,

python ../measurements/bench_onnx.py [--tiny | --products | --classes CHECKPOINT...]

The network without quantizers (onnxruntime folds its BatchNorms), `--profile qdq` and `--profile integer`, in turn in one run,
at W4A4 with random weights, on which times do not depend. Writes measurements/onnx_times.csv. --tiny: small images, and no
file, to see that it runs. --products: a linear layer at 4 bits, input in float32, in each operator; writes
measurements/onnx_products.csv. --classes: how many images of its test set each fine-tuned network puts into the class that
PyTorch does, with `--profile integer`; writes measurements/onnx_classes.csv.
"""

import sys
from pathlib import Path

sys.path.insert(0, ".")  # the stage

import numpy as np
import torch

from benchmark import ONNX_DENSE, ONNX_INTEGER, ONNX_PACKED, fresh, images_for, in_onnxruntime, measure, prepare, unquantized
from onnx_export import OPSET, logits_of_onnxruntime, session
from onnx_integer import MICROSOFT, to_integer_onnx
from packed_network import CPU, load_any, rebuild, recorded_config
from timing import show
from util.command import Parser
from util.data_loader import create_loaders
from util.errors import UserError, user_errors_on_one_line

NETWORKS = {"resnet50": 224, "resnet18": 224, "mobilenet_v2": 224, "resnet20": 32, "vit_tiny_patch4_32": 32}
BATCHES = 1, 16
PRODUCTS = (65, 192, 768), (197, 768, 3072), (1, 2048, 1000), (16, 2048, 1000)  # rows, inputs, outputs
BLOCK = 32  # weights of MatMulNBits with one step


def times(arch, size, batches):
    torch.manual_seed(0)
    network = fresh({"arch": arch, "config": {"quan": {}}, "num_classes": 1000, "input_size": size}, arch, None)
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


def products(rows, inputs, outputs):
    generator = np.random.default_rng(0)
    weight = generator.integers(-8, 8, (outputs, inputs))
    nibbles = (weight + 8).astype(np.uint8).reshape(outputs, inputs // BLOCK, BLOCK // 2, 2)
    steps, x = np.full(outputs, 0.01, np.float32), generator.normal(size=(rows, inputs)).astype(np.float32)
    shared = {"step": np.float32(0.1), "zero": np.uint8(8), "top": np.uint8(15), "bias": np.zeros(outputs, np.float32),
              "w": weight.T.astype(np.int8), "steps": steps, "none": np.zeros(outputs, np.int8), "y_zero": np.uint8(128),
              "float": weight.T.astype(np.float32), "packed": nibbles[..., 0] | nibbles[..., 1] << 4,
              "many": np.repeat(steps, inputs // BLOCK)}
    integers = [("QuantizeLinear", ["x", "step", "zero"], "wide", {}), ("Min", ["wide", "top"], "q", {})]
    floats = [*integers, ("DequantizeLinear", ["q", "step", "zero"], "f", {})]
    size = {"K": inputs, "N": outputs, "bits": 4, "block_size": BLOCK}
    ways = {"float32": [("MatMul", ["x", "float"], "p", {}), ("Add", ["p", "bias"], "y", {})],
            "MatMulIntegerToFloat": [*integers, ("MatMulIntegerToFloat", ["q", "w", "step", "steps", "zero", "none", "bias"],
                                                 "y", {})],
            "QLinearMatMul": [*integers, ("QLinearMatMul", ["q", "step", "zero", "w", "steps", "none", "step", "y_zero"], "r",
                                           {}), ("DequantizeLinear", ["r", "step", "y_zero"], "y", {})],
            "MatMulNBits": [*floats, ("MatMulNBits", ["f", "packed", "many", "", "", "bias"], "y", size)],
            "MatMulNBits, 8-bit inputs": [*floats, ("MatMulNBits", ["f", "packed", "many", "", "", "bias"], "y",
                                                    size | {"accuracy_level": 4})]}
    sessions = {way: loaded(nodes, shared, inputs) for way, nodes in ways.items()}
    measured = measure({way: lambda x, runner=runner: runner.run(None, {"x": x}) for way, runner in sessions.items()}, x)
    return [{"rows": rows, "inputs": inputs, "outputs": outputs, "operator": row["way"], "ms": row["ms"],
             "over_float32": 1 / row["ratio"]} for row in measured]


def loaded(nodes, constants, inputs):
    from onnx import TensorProto, helper, numpy_helper

    used = {name for _, names, _, _ in nodes for name in names}
    made = [helper.make_node(kind, names, [out], domain=MICROSOFT if kind.startswith(("MatMulN", "MatMulI")) else "", **more)
            for kind, names, out, more in nodes]
    graph = helper.make_graph(made, "product", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                              [numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in constants.items()
                               if name in used])
    return session(helper.make_model(graph, ir_version=10, opset_imports=[
        helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]).SerializeToString())


def main(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--classes", nargs="+", metavar="CHECKPOINT")
    options = parser.parse_args(arguments)
    prepare(threads=1)
    if options.classes:
        rows = [classes(path) for path in options.classes]
        show(Path(__file__).with_name("onnx_classes.csv"), list(rows[0]), rows, 4)
        return
    if options.products:
        rows = [row for shape in PRODUCTS for row in products(*shape)]
        show(Path(__file__).with_name("onnx_products.csv"), list(rows[0]), rows, 3)
        return
    if options.tiny:
        print(*times("resnet20", 16, [1, 2]), sep="\n")
        return
    rows = [row for arch, size in NETWORKS.items() for row in times(arch, size, BATCHES)]
    show(Path(__file__).with_name("onnx_times.csv"), list(rows[0]), rows, 3)


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
