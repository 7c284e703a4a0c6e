"""ONNX: what onnxruntime computes from integer weights and inputs, beside PyTorch."""

import importlib.util
import pathlib

import pytest
import torch
from test_export import CONFIG, SUBCLASSES, complaint, write_checkpoint

import export
import main
import onnx_export
from packed_network import load_any, rebuild
from quan.config import ActQuantizerConfig, QuanConfig, QuantizerConfig
from util.datasets import read_digits
from util.errors import UserError

NET = """
from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8), nn.SiLU(),
                         nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, num_classes))
"""
needs_onnxruntime = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in onnx_export.NEEDED["--onnx"]),
                                       reason="requirements-export.txt is not installed")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    said = complaint(capsys, export.main, "run.pth.tar", "--onnx", "model.onnx")
    assert "--onnx needs onnxscript: pip install -r requirements-export.txt" in said


class Deciding(torch.nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if images.mean() > 0 else images.amax((2, 3))


@needs_onnxruntime
def test_what_pytorch_cannot_write_is_said_by_the_innermost_cause():
    with pytest.raises(UserError) as error:
        onnx_export.to_onnx(Deciding(), 8)
    assert "data-dependent" in str(error.value) and "step 1" not in str(error.value) and "\33" not in str(error.value)
    inner, outer = ValueError("only 4D\nmore"), RuntimeError("\33[96mThis is step 3/3")
    node = KeyError("Error when translating node %softmax : [num_users=1]")
    node.__cause__, outer.__cause__ = inner, node
    assert onnx_export.cause(outer) == "only 4D, in softmax" and onnx_export.cause(inner) == "only 4D"


@needs_onnxruntime
@pytest.mark.parametrize("factory", ["net", "cosine"])
def test_subclasses_of_layers_are_written_with_their_integers(factory):
    pathlib.Path("net.py").write_text(SUBCLASSES)
    network = write_checkpoint(f"net.py:{factory}", 12)
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = onnx_export.to_onnx(network.model.eval(), 12)
    assert sum(tensor.data_type == 3 for tensor in model.graph.initializer if tensor.dims) == (4 if factory == "net" else 3)
    with torch.no_grad():
        expected = network.model(images)
    torch.testing.assert_close(onnx_export.logits_of_onnxruntime(model.SerializeToString(), images), expected,
                               rtol=0, atol=1e-4)


@needs_onnxruntime
@pytest.mark.usefixtures("shallow")
def test_a_trained_network_gives_the_same_classes_and_each_layer_the_same_values(capsys):
    pathlib.Path("config.yaml").write_text(CONFIG)
    main.main(["config.yaml", "opt=momentum"])
    path = "results/run/run_checkpoint.pth.tar"
    export.main([path, "--output", "model.safetensors"])
    export.main(["model.safetensors", "--onnx", "model.onnx"])
    assert "random images in onnxruntime" in capsys.readouterr().out
    data, model = pathlib.Path("model.onnx").read_bytes(), rebuild(load_any(path), path).model
    pixels = read_digits(16)[1].images.float()
    images = ((pixels - pixels.mean()) / pixels.std()).expand(-1, 3, -1, -1).contiguous()
    with torch.no_grad():
        expected = model(images)
    found = torch.cat([onnx_export.logits_of_onnxruntime(data, part) for part in images.split([1, 100, len(images) - 101])])
    first, second = expected.topk(2).values.T
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.999
    assert (found.argmax(1) == expected.argmax(1))[first - second > 1e-2].all()
    compare_layers(data, model, images[:8])


def compare_layers(data, model, images):
    """Each convolution and linear layer gives the same as PyTorch from the input that PyTorch gives it."""
    import onnx
    from onnx.utils import Extractor

    calls = []
    for module in model.modules():
        if hasattr(module, "quan_w_fn"):
            module.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs[0], output)))
    with torch.no_grad():
        model(images)
    graph = onnx.load_from_string(data)
    maker = {output: node for node in graph.graph.node for output in node.output}
    layers = [node for node in graph.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(layers) == len(calls) == 8
    extractor = Extractor(graph)
    for node, (module, entering, leaving) in zip(layers, calls, strict=True):
        start, end = node.input[0], node
        if module.bias is not None:
            end = next(other for other in graph.graph.node if other.op_type == "Add" and node.output[0] in other.input)
        while maker.get(start) is not None and maker[start].op_type in ("DequantizeLinear", "Clip", "QuantizeLinear"):
            start = maker[start].input[0]
        part = extractor.extract_model([start], list(end.output))
        part.graph.input[0].name = "images"
        for other in part.graph.node:
            other.input[:] = ["images" if name == start else name for name in other.input]
        found = onnx_export.logits_of_onnxruntime(part.SerializeToString(), entering)
        assert (found - leaving).abs().max() <= 1e-5 * max(1, leaving.abs().max()), node.name


@needs_onnxruntime
def test_weights_take_the_narrowest_types_that_load_and_inputs_may_be_signed(capsys):
    pathlib.Path("net.py").write_text(NET)
    bits = {"weight_bits": [4, 2, 2, 8], "act_bits": [8, 3, 8, 4]}
    quan = QuanConfig(act=ActQuantizerConfig(all_positive=False), weight=QuantizerConfig(per_channel=True))
    network = write_checkpoint("net.py:net", 16, quan=quan, bits=bits)
    export.main(["run.pth.tar", "--onnx", "model.onnx", "--arch", "net.py:net", "--fold-bn"])
    said, data = capsys.readouterr().out, pathlib.Path("model.onnx").read_bytes()
    assert "-bit integers" in said
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (onnx_export.logits_of_onnxruntime(data, images) - network.model(images)).abs().max() < 1e-5
    check_types(data)


@needs_onnxruntime
@pytest.mark.parametrize(("arch", "size", "sparsity", "flags"), [
    ("net.py:net", 16, None, []), ("net.py:net", 16, 0.8, ["--fold-bn"]),
    ("net.py:net", 16, 32, []), ("vit_tiny_patch4_32", 32, None, [])])
def test_onnx_passes_its_own_checker_as_it_is_written(arch, size, sparsity, flags):
    import onnx

    pathlib.Path("net.py").write_text(NET)
    left_alone = sparsity == 32  # inputs at 32 bits
    bits = {"bits": {"weight_bits": [2, 4, 4, 3], "act_bits": [32] * 4}} if left_alone else {}
    network = write_checkpoint(arch, size, None if left_alone else sparsity, **bits)
    export.main(["run.pth.tar", "--onnx", "model.onnx", *flags, *(["--arch", arch] if ":" in arch else [])])
    model = onnx.load("model.onnx")
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert any(tensor.data_type in (onnx.TensorProto.INT4, getattr(onnx.TensorProto, "INT2", -1))
               for tensor in model.graph.initializer)
    if left_alone:
        assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == 1  # of the last layer
        images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        found = onnx_export.logits_of_onnxruntime(model.SerializeToString(), images)
        assert (found - network.model(images)).abs().max() < 1e-5


def check_types(data):
    """With types of 8 bits only, the same model takes more bytes; operators are those that hardware knows."""
    import onnx

    graph = onnx.load_from_string(data)
    used = {node.op_type for node in graph.graph.node}
    assert {"QuantizeLinear", "Clip", "DequantizeLinear", "Conv"} <= used
    wide = [tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    narrow = [tensor for tensor in graph.graph.initializer if tensor.data_type in (onnx.TensorProto.INT4,
                                                                                   getattr(onnx.TensorProto, "INT2", -1))]
    assert len(wide) >= 3 and narrow
