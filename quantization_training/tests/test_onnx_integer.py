"""ONNX that multiplies integers: what the file holds, what onnxruntime computes from it, and what stays in float32."""

import pathlib
import re

import numpy as np
import pytest
import torch
from test_export import CONFIG, PER_CHANNEL, SIGNED, complaint, write_checkpoint
from test_onnx import needs_onnxruntime
from test_qonnx import ATTENTION
from torch import nn

import export
import main
import onnx_export
import onnx_integer
from folding import fold
from packed_network import load_any, rebuild
from util.datasets import read_digits

pytestmark = needs_onnxruntime
NETS = """
import torch
from torch import nn


class Through(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self.steps = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.head(self.steps(self, x).mean((2, 3)))


def block(inputs, outputs, size=3, relu=nn.ReLU, **options):
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, bias=False, **options), nn.BatchNorm2d(outputs), relu())


def residual(num_classes):
    return Through(lambda net, x: net.relu((lambda y: net.second(net.first(y)) + net.shortcut(y))(net.stem(x))),
                   stem=block(3, 16, stride=2), first=block(16, 8, stride=2, padding=1), second=nn.Conv2d(8, 8, 3, padding=1),
                   shortcut=nn.Conv2d(16, 8, 1, stride=2), relu=nn.ReLU(), head=nn.Linear(8, num_classes))


def depthwise(num_classes):
    return Through(lambda net, x: net.wide(net.narrow(net.depthwise(net.stem(x)))),
                   stem=block(3, 6, stride=2, relu=nn.ReLU6), depthwise=block(6, 6, padding=1, groups=6, relu=nn.ReLU6),
                   narrow=nn.Conv2d(6, 4, 1), wide=block(4, 8, 1, relu=nn.ReLU6), head=nn.Linear(8, num_classes))


def odd(num_classes):
    return Through(lambda net, x: net.last(net.relu(net.groups(net.dilated(net.stem(x))))),
                   stem=block(3, 8, stride=1), dilated=block(8, 8, (3, 2), padding=(2, 1), dilation=(2, 1), stride=(1, 3)),
                   groups=nn.Conv2d(8, 8, 3, groups=4, padding=1), relu=nn.ReLU(),
                   last=nn.Conv2d(8, 6, (2, 3), padding="same", dilation=(2, 1)), head=nn.Linear(6, num_classes))


def circular(num_classes):
    return Through(lambda net, x: net.last(net.clipped(net.circular(net.stem(x)))), stem=block(3, 4),
                   circular=nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
                   clipped=nn.Sequential(nn.Conv2d(4, 4, 3), nn.Hardtanh(0.5, 2)), last=nn.Conv2d(4, 4, 1),
                   head=nn.Linear(4, num_classes))


class Plane(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.added = nn.Parameter(torch.linspace(-1, 1, channels))

    def forward(self, x):
        return (x + self.added).relu()


def plane(num_classes):
    return Through(lambda net, x: net.last(net.plane(net.first(net.stem(x)))), stem=block(3, 4),
                   first=nn.Conv2d(4, 8, 3, bias=False), plane=Plane(8), last=nn.Conv2d(8, 4, 1),
                   head=nn.Linear(4, num_classes))


def lone(num_classes):
    return Through(lambda net, x: (lambda y: y + net.other(y.mean(0)).relu() + net.linear(y.mean((0, 2, 3))).view(-1, 1, 1))(
                   net.first(net.stem(x))), stem=block(3, 4), first=nn.Conv2d(4, 4, 3), other=nn.Conv2d(4, 4, 1),
                   linear=nn.Linear(4, 4), head=nn.Linear(4, num_classes))


def vast(num_classes):
    return nn.Sequential(block(3, 4), nn.Flatten(), nn.Linear(4 * 71 * 71, 3), nn.ReLU(), nn.Linear(3, num_classes))
"""
KINDS = {"residual": (1, 3, 1), "depthwise": (2, 2, 1), "odd": (1, 2, 2), "circular": (0, 3, 2), "plane": (0, 3, 1)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("nets.py").write_text(NETS)
    pathlib.Path("attention.py").write_text(ATTENTION)


def made(arch, size, sparsity=None, **changes):
    """(the network with its BatchNorms folded, the model in integers, how many layers are computed how, error of biases)."""
    model = write_checkpoint(arch, size, sparsity, **changes).model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[::2] *= -1
    fold(model, images(size))
    graph = onnx_export.to_onnx(model, size)
    counts, error = onnx_integer.with_integers(graph)
    onnx_export.checked(graph)
    return model, graph, tuple(counts.values()), error


def images(size, count=5):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def constants(graph):
    import onnx

    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


def exactly(graph, x):
    """What onnx's own interpreter computes, in which no sum saturates."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class MatMulIntegerToFloat(OpRun):
        op_domain = "com.microsoft"

        def _run(self, a, b, a_scale, b_scale, a_zero, b_zero, bias):
            product = (a.astype(np.int64) - a_zero) @ (b.astype(np.int64) - b_zero)
            assert np.abs(product).max() < 2**31
            return ((product * a_scale.astype(np.float64) * b_scale + bias).astype(np.float32),)

    return torch.from_numpy(ReferenceEvaluator(graph, new_ops=[MatMulIntegerToFloat]).run(None, {"images": x.numpy()})[0])


def check_bounds(graph):
    """No kernel's sum of two products leaves 16 bits, no sum of all 32 bits."""
    values = constants(graph)
    top = {node.output[0]: int(values[node.input[1]]) for node in graph.graph.node
           if node.op_type == "Min" and values[node.input[1]].dtype == np.uint8}
    for node in graph.graph.node:
        if node.op_type != "QLinearConv":
            continue
        weight, most, zero = values[node.input[3]], top.get(node.input[0], 255), int(values[node.input[5]])
        integers = weight.astype(np.int64) - zero
        assert zero == (128 if weight.dtype == np.uint8 else 0)
        assert weight.dtype == np.uint8 or 2 * most * np.abs(integers).max() < 2**15
        total = most * np.abs(integers).reshape(len(weight), -1).sum(1) + np.abs(values[node.input[8]].astype(np.int64))
        assert total.max() < 2**31


def agree(found, expected, least):
    """Whether a share of images has the same logits; in the others an input lies on the edge between two integers."""
    return (((found - expected).abs().amax(1) <= 1e-4 * expected.abs().max()).float().mean() >= least).item()


@pytest.mark.parametrize(("arch", "size", "sparsity", "changes"), [
    ("residual", 17, None, {}), ("residual", 16, 0.7, {"quan": PER_CHANNEL}), ("depthwise", 16, None, {"quan": SIGNED}),
    ("depthwise", 15, None, {}), ("odd", 14, 0.5, {}), ("circular", 9, None, {}), ("plane", 12, None, {})])
def test_the_outputs_are_those_of_the_network_though_biases_are_rounded(arch, size, sparsity, changes):
    model, graph, counts, error = made(f"nets.py:{arch}", size, sparsity, **changes)
    assert counts == KINDS[arch]
    check_bounds(graph)
    with torch.no_grad():
        expected = model(images(size, 20))
    data = graph.SerializeToString()
    for count in (1, 20):
        found = onnx_export.logits_of_onnxruntime(data, images(size, 20)[:count])
        assert agree(found, expected[:count], 0.9), (found - expected[:count]).abs().amax(1)
    assert agree(exactly(graph, images(size)), onnx_export.logits_of_onnxruntime(data, images(size)), 0.8)
    assert error == 0


def test_attention_has_its_linear_layers_in_integers_and_products_of_two_inputs_in_float32():
    model, graph, counts, _ = made("attention.py:net", 12, quan=SIGNED)
    assert counts == (0, 3, 2)
    with torch.no_grad():
        expected = model(images(12))
    assert agree(onnx_export.logits_of_onnxruntime(graph.SerializeToString(), images(12)), expected, 0.8)


def fit_step(layer, inputs):
    layer.quan_a_fn.s.fill_(inputs[0].max() / 250)


@pytest.mark.parametrize("bits", [8, 7])
def test_no_kernel_saturates_where_all_products_are_large(bits):
    """Kernels for x86 without VNNI add two products in 16 bits, where weights are int8."""
    model = write_checkpoint("nets.py:residual", 16, bits={"weight_bits": [bits] * 3, "act_bits": [8] * 3}).model.eval()
    ones = torch.ones(1, 3, 16, 16)
    fold(model, ones)
    with torch.no_grad():
        for layer in [module for module in model.modules() if hasattr(module, "quan_w_fn")]:
            layer.weight.fill_(1)
            layer.bias.fill_(0)
            layer.quan_w_fn.s.fill_(1 / layer.quan_w_fn.quantization_range[1])
            if hasattr(layer.quan_a_fn, "s"):
                layer.register_forward_pre_hook(fit_step)
        expected = model(ones)
        for layer in model.modules():
            layer._forward_pre_hooks.clear()
    graph = onnx_export.to_onnx(model, 16)
    onnx_integer.with_integers(graph)
    check_bounds(graph)
    kinds = {values.dtype for name, values in constants(graph).items() if name.endswith("/weight")}
    assert kinds == {np.dtype(np.uint8)} if bits == 8 else np.dtype(np.int8) in kinds
    torch.testing.assert_close(onnx_export.logits_of_onnxruntime(graph.SerializeToString(), ones), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(onnx_export.logits_of_onnxruntime(graph.SerializeToString(), ones), exactly(graph, ones),
                               rtol=1e-5, atol=0)


def test_sums_that_32_bits_may_not_hold_stay_in_float32_and_a_bias_that_they_do_not_hold_is_added_in_float32():
    assert made("nets.py:vast", 73, bits={"weight_bits": [8], "act_bits": [8]})[2] == (0, 1, 2)
    model = write_checkpoint("nets.py:residual", 16).model.eval()
    model.first[1].bias.data.fill_(1e12)
    fold(model, images(16))
    graph = onnx_export.to_onnx(model, 16)
    assert onnx_integer.with_integers(graph)[0]["QLinearConv"] == 0
    with torch.no_grad():
        assert agree(onnx_export.logits_of_onnxruntime(graph.SerializeToString(), images(16)), model(images(16)), 0.8)


@pytest.mark.parametrize(("bits", "is_signed"), [(2, False), (3, False), (4, True), (6, False), (8, True)])
def test_rounded_biases_round_each_sum_alike_or_as_near_to_an_edge_as_is_said(bits, is_signed):
    generator = np.random.default_rng(bits)
    unit, bias = generator.uniform(0.01, 0.5, 300), generator.normal(0, 20, 300)
    edges = np.arange(2**bits - 1) + 0.5 - is_signed * 2 ** (bits - 1)
    factor, multiple, new, error = onnx_integer.fine_biases(bias, unit, edges, np.full(300, 15), (np.full((300, 1), -60),
                                                                                               np.full((300, 1), 60)))
    sums = np.arange(-60, 61)
    exact = (sums + bias[:, None]) * unit[:, None]
    found = (sums * factor[:, None] + multiple[:, None]) * (new / factor)[:, None]
    is_other = (exact[..., None] > edges) != (found[..., None] > edges)
    distance = np.abs(exact[..., None] - edges)
    np.testing.assert_allclose(np.where(is_other, distance, 0).max((1, 2)), error, atol=1e-9)
    assert (multiple == np.round(multiple)).all() and (factor >= 1).all() and (factor <= 15).all()
    assert error.max() < unit.max() / 15 and (error == 0).mean() > (0.99 if bits < 6 else 0.9)


def test_a_convolution_whose_bias_would_be_off_by_too_much_is_no_qlinearconv(monkeypatch):
    monkeypatch.setattr(onnx_integer, "MOST_ERROR", -1)
    model, graph, counts, error = made("nets.py:depthwise", 16)
    assert counts == (0, 3, 2) and error == 0
    with torch.no_grad():
        assert agree(onnx_export.logits_of_onnxruntime(graph.SerializeToString(), images(16)), model(images(16)), 0.8)


@pytest.mark.usefixtures("shallow")
def test_a_trained_network_in_integers_gives_the_same_classes(capsys):
    pathlib.Path("config.yaml").write_text(CONFIG)
    main.main(["config.yaml", "opt=momentum"])
    path = "results/run/run_checkpoint.pth.tar"
    export.main([path, "--onnx", "model.onnx", "--profile", "integer"])
    said = capsys.readouterr().out
    assert "layers: 3 in QLinearConv, 4 in MatMulIntegerToFloat, 1 in float32; biases rounded to within 0.0000" in said
    import onnx

    onnx.checker.check_model(onnx.load("model.onnx"), full_check=True)
    pixels = read_digits(16)[1].images.float()
    x = ((pixels - pixels.mean()) / pixels.std()).expand(-1, 3, -1, -1).contiguous()
    with torch.no_grad():
        expected = rebuild(load_any(path), path).model(x)
    found = onnx_export.logits_of_onnxruntime(pathlib.Path("model.onnx").read_bytes(), x)
    (first, second), is_same = expected.topk(2).values.T, found.argmax(1) == expected.argmax(1)
    assert is_same.float().mean() >= 0.97 and is_same[first - second > 0.1 * expected.std()].all()


@pytest.mark.parametrize(("profile", "said"), [("qdq", "weights of"), ("integer", "4 in MatMulIntegerToFloat, 1 in float32")])
def test_inputs_of_layers_without_a_batch_are_written(profile, said, capsys):
    """Of one dimension or three: onnxruntime does not load what gives them a batch after their quantizer."""
    import onnx

    write_checkpoint("nets.py:lone", 12)
    export.main(["run.pth.tar", "--onnx", "model.onnx", "--arch", "nets.py:lone", "--profile", profile])
    found = capsys.readouterr().out
    assert said in found and float(re.search(r"within (\S+) of PyTorch's", found)[1]) < 1e-5
    onnx.checker.check_model(onnx.load("model.onnx"), full_check=True)


def test_a_network_that_looks_for_its_batchnorms_keeps_them(monkeypatch, capsys):
    pathlib.Path("nets.py").write_text(NETS.replace("return self.head", "self.stem[1].num_features; return self.head"))
    write_checkpoint("nets.py:depthwise", 16)
    export.main(["run.pth.tar", "--onnx", "model.onnx", "--profile", "integer", "--arch", "nets.py:depthwise"])
    assert "layers: 1 in QLinearConv, 2 in MatMulIntegerToFloat, 2 in float32;" in capsys.readouterr().out


def test_a_profile_without_onnx_and_other_outputs_are_refused_in_one_line(monkeypatch, capsys):
    assert "--profile: is about an ONNX model" in complaint(capsys, export.main, "run.pth.tar", "--output", "m.safetensors",
                                                            "--profile", "integer")
    write_checkpoint("nets.py:depthwise", 16)
    monkeypatch.setattr(onnx_integer, "scaled_integers", lambda layer, edges: (
        layer.weight.astype(np.int8), layer.step * 3, np.zeros(len(layer.step), np.int32), np.zeros(len(layer.step))))
    said = complaint(capsys, export.main, "run.pth.tar", "--onnx", "model.onnx", "--profile", "integer", "--arch",
                     "nets.py:depthwise")
    assert "gives other outputs than PyTorch" in said and "--profile qdq may do" in said
    assert not pathlib.Path("model.onnx").exists()


def test_a_model_that_onnxruntime_does_not_load_is_one_line_and_no_file(monkeypatch, capsys):
    write_checkpoint("nets.py:depthwise", 16)
    monkeypatch.setattr(onnx_integer, "MICROSOFT", "unknown.operators")
    said = complaint(capsys, export.main, "run.pth.tar", "--onnx", "model.onnx", "--profile", "integer", "--arch",
                     "nets.py:depthwise", "--fold-bn")
    assert "--onnx: the installed onnxruntime does not compute this network" in said
    assert not pathlib.Path("model.onnx").exists()


def test_a_convolution_that_adds_its_bias_itself_stays_as_it_is():
    """The exporter of a later PyTorch may write it so."""
    import onnx

    model = write_checkpoint("nets.py:residual", 16).model.eval()
    nn.init.constant_(model.second.bias, 3.0)
    graph, x = onnx_export.to_onnx(model, 16), images(16)
    expected = onnx_export.logits_of_onnxruntime(graph.SerializeToString(), x)
    users = {name: node for node in graph.graph.node for name in node.input}
    conv = next(node for node in graph.graph.node if node.op_type == "Conv" and users[node.output[0]].op_type == "Add"
                and (constants(graph).get(users[node.output[0]].input[1], np.zeros(1)) == 3).all())
    add = users[conv.output[0]]
    graph.graph.initializer.append(onnx.numpy_helper.from_array(constants(graph)[add.input[1]].reshape(-1), "bias"))
    conv.input.append("bias")
    conv.output[0] = add.output[0]
    graph.graph.node.remove(add)
    counts, _ = onnx_integer.with_integers(graph)
    found = onnx_export.logits_of_onnxruntime(onnx_export.checked(graph), x)
    assert counts["float32"] == 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
