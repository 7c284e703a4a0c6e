"""QONNX: the bits of the policy in Quant nodes, the outputs of PyTorch, and the BitOPs of the search."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest
import torch
from test_export import CONFIG, PER_CHANNEL, SIGNED, complaint, write_checkpoint
from test_onnx import NET, needs_onnxruntime

import export
import main
import onnx_export
import qonnx_export
from packed_network import load_any, rebuild
from quan.config import ActQuantizerConfig, QuanConfig, QuantizerConfig
from util.datasets import read_digits

needs_qonnx = pytest.mark.skipif(importlib.util.find_spec("qonnx") is None, reason="the package qonnx is not installed")
ATTENTION = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.patches, self.depthwise = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mixed, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.depthwise(self.patches(x)).flatten(2).transpose(1, 2)
        query, key, value = self.mixed(x).chunk(3, -1)
        x = x + self.out((query @ key.transpose(1, 2)).softmax(-1) @ value)
        return self.head(x.mean(1))

def net(num_classes):
    return Net(num_classes)
"""
SYMMETRIC = QuanConfig(act=ActQuantizerConfig(all_positive=False, symmetric=True), weight=QuantizerConfig(symmetric=True))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def interpreted(model, images):
    """What onnx's own interpreter gives, with Quant written down from its specification."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Quant(OpRun):
        op_domain = qonnx_export.DOMAIN

        def _run(self, x, scale, zero, bits, signed=None, narrow=None, rounding_mode=None):
            assert rounding_mode == "ROUND" and zero == 0
            high = 2 ** (bits - signed) - 1
            low = -high - 1 + narrow if signed else 0
            return ((np.round(np.clip(x / scale, low, high)) * scale).astype(np.float32),)

    return torch.from_numpy(ReferenceEvaluator(model, new_ops=[Quant]).run(None, {"images": images.numpy()})[0])


def ranges_of(model):
    """[((Qn, Qp) of the weight, of the input or None)] of the layers, in the order of the graph."""
    import onnx

    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    ranges = {}
    for node in model.graph.node:
        if node.op_type == "Quant":
            bits, says = int(values[node.input[3]]), {entry.name: entry.i for entry in node.attribute}
            high = 2 ** (bits - says["signed"]) - 1
            ranges[node.output[0]] = ((high + 1 - says["narrow"]) * says["signed"], high)
    transposed = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    layers = [(transposed.get(node.input[1], node.input[1]), node.input[0]) for node in model.graph.node
              if node.op_type in ("Conv", "Gemm", "MatMul")]
    return [(ranges[weight], ranges.get(entering)) for weight, entering in layers if weight in ranges]


@needs_onnxruntime
@pytest.mark.parametrize(("arch", "size", "sparsity", "changes"), [
    ("net.py:net", 15, None, {"quan": SIGNED}), ("net.py:net", 16, 0.8, {"quan": PER_CHANNEL}),
    ("attention.py:net", 12, None, {"quan": SYMMETRIC}), ("resnet20", 16, None, {})])
@pytest.mark.usefixtures("shallow")
def test_quant_nodes_have_the_bits_of_the_policy_and_give_the_outputs_of_pytorch(arch, size, sparsity, changes):
    import onnx

    pathlib.Path("net.py").write_text(NET)
    pathlib.Path("attention.py").write_text(ATTENTION)
    network = write_checkpoint(arch, size, sparsity, **changes)
    model = qonnx_export.to_qonnx(network.model, size)
    onnx.checker.check_model(model, full_check=True)
    layers = [module for module in network.model.modules() if hasattr(module, "quan_w_fn")]
    assert ranges_of(model) == [(layer.quan_w_fn.quantization_range, getattr(layer.quan_a_fn, "quantization_range", None))
                                for layer in layers]
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.model.eval()(image)
    torch.testing.assert_close(interpreted(model, image), expected, rtol=0, atol=1e-5)


@needs_qonnx
@needs_onnxruntime
@pytest.mark.usefixtures("shallow")
def test_the_package_qonnx_gives_the_outputs_of_pytorch_on_digits_and_the_bitops_of_the_search(capsys):
    from qonnx.core.onnx_exec import execute_onnx

    pathlib.Path("config.yaml").write_text(CONFIG)
    main.main(["config.yaml", "opt=momentum", "epochs=1"])
    path = "results/run/run_checkpoint.pth.tar"
    export.main([path, "--qonnx", "quant_nodes.onnx"])
    network = rebuild(load_any(path), path)
    counted = f"{network.cost['gbitops_exact']:.3f} G"
    assert f"BitOPs of qonnx {counted}, of the search by the exact count {counted}" in capsys.readouterr().out
    pixels = read_digits(16)[1].images.float()
    images = ((pixels - pixels.mean()) / pixels.std()).expand(-1, 3, -1, -1).contiguous()
    model = onnx_export.to_onnx(network.model, 16, qonnx_export.QonnxLayer, batch=len(images))  # else a minute
    found = torch.from_numpy(execute_onnx(qonnx_export.wrapped(model), {"images": images.numpy()})["logits"])
    with torch.no_grad():
        expected = network.model(images)
    change, (first, second) = (found - expected).abs().amax(1), expected.topk(2).values.T
    assert (change < 1e-4).float().mean() >= 0.9  # in the others an input lies on the edge between two integers
    assert (found.argmax(1) == expected.argmax(1))[first - second > 2 * change.max()].all()
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.99


@needs_qonnx
@needs_onnxruntime
@pytest.mark.parametrize(("arch", "size", "sparsity"), [("attention.py:net", 12, None), ("net.py:net", 17, 0.5)])
def test_the_package_qonnx_counts_the_bitops_of_the_search(arch, size, sparsity):
    pathlib.Path("net.py").write_text(NET)
    pathlib.Path("attention.py").write_text(ATTENTION)
    network = write_checkpoint(arch, size, sparsity)
    counted = qonnx_export.gbitops_of_qonnx(qonnx_export.to_qonnx(network.model, size))
    assert counted == pytest.approx(network.cost["gbitops_exact"], rel=1e-12)


def test_without_the_package_qonnx_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "qonnx" else name)
    said = complaint(capsys, export.main, "run.pth.tar", "--qonnx", "model.onnx")
    assert "--qonnx needs qonnx: pip install -r requirements-export.txt" in said


@needs_onnxruntime
def test_a_network_that_the_package_qonnx_cannot_compute_is_one_line_and_no_file(monkeypatch, capsys):
    pathlib.Path("net.py").write_text(NET)
    write_checkpoint("net.py:net", 16)
    monkeypatch.setattr("onnx_export.check_installed", lambda flag: None)
    monkeypatch.setitem(sys.modules, "qonnx.core.onnx_exec", None)
    said = complaint(capsys, export.main, "run.pth.tar", "--qonnx", "model.onnx", "--arch", "net.py:net")
    assert "--qonnx: the package qonnx cannot compute this network" in said
    assert not pathlib.Path("model.onnx").exists()
