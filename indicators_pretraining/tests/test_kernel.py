"""The compiled loops of LSQ, and the layers that quantize and operate at once, against plain chains of tensor operations."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantizer import plain_chain
from torch import nn

from quan.func import QuanConv2d, QuanLinear
from quan.fused import Operation
from quan.quantizer import LsqQuan, integer_range, kernel, lsq
from quan.quantizer.lsq import gradients, integers
from quan.utils import weights_quantized_once
from util.errors import UserError

SETTINGS = settings(derandomize=True, deadline=None, max_examples=80)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    try:
        kernel.use("compiled")
    except UserError as error:
        pytest.skip(str(error))
    yield
    kernel.use("plain")


@pytest.fixture(autouse=True)
def compiled_afterwards(monkeypatch):
    yield
    monkeypatch.undo()
    kernel.use("compiled")


@st.composite
def problems(draw):
    """(values, steps, Qn, Qp): per-tensor or per-channel, in any memory layout, some values exactly between two integers."""
    shape = draw(st.sampled_from([(7,), (3, 40_000), (5, 3, 4, 3), (2, 3, 100, 101), (4, 1, 1, 1), (0, 3), (2, 6, 1, 9)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    qn, qp = integer_range(draw(st.integers(2, 8)), *draw(st.sampled_from([(False, False), (True, False), (True, True)])))
    per_channel = draw(st.booleans()) and shape[0] > 0
    s = torch.rand([shape[0], *[1] * (len(shape) - 1)] if per_channel else [], generator=generator) + 0.05
    v = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 1.0, 20.0]))
    v = torch.where(torch.rand(shape, generator=generator) < 0.2, s * draw(st.sampled_from([-qn, qp, 0.5, 1.5])), v)
    return laid_out(v, draw(st.sampled_from(["contiguous", "channels last", "transposed"]))), s, qn, qp


def laid_out(v, layout):
    if layout == "channels last" and v.dim() == 4:
        return v.contiguous(memory_format=torch.channels_last)
    return v.transpose(0, -1).contiguous().transpose(0, -1) if layout == "transposed" else v


@SETTINGS
@given(problems(), st.integers(0, 2**31))
def test_float32_values_equal_the_plain_chain_bit_for_bit(problem, seed):
    v, s, qn, qp = problem
    assert kernel.takes(v, s)
    incoming = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed))
    ours, theirs = v.clone().requires_grad_(), v.clone().requires_grad_()
    q, expected = lsq(ours, s, qn, qp), plain_chain(theirs, s, qn, qp, 1.0)
    assert torch.equal(q, (v / s).clamp(-qn, qp).round() * s)
    torch.testing.assert_close(q, expected, rtol=1e-6, atol=0)  # the chain adds and subtracts, which may round
    q.backward(incoming)
    expected.backward(incoming)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)  # zeros are zeros in both


@SETTINGS
@given(problems(), st.integers(0, 2**31))
def test_float64_gradients_equal_the_plain_chain(problem, seed):
    v, s, qn, qp = (part.double() if isinstance(part, torch.Tensor) else part for part in problem)
    assert kernel.takes(v, s)
    scale = 1 / math.sqrt(max(v.numel(), 1) * qp)
    incoming = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours, theirs = [(v.clone().requires_grad_(), s.clone().requires_grad_()) for _ in range(2)]
    lsq(*ours, qn, qp, scale).backward(incoming)
    plain_chain(*theirs, qn, qp, scale).backward(incoming)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-14, atol=0)
    terms = (incoming.abs() * (qn + qp + 1)).sum_to_size(s.shape) * scale
    assert ((ours[1].grad - theirs[1].grad).abs() <= 1e-9 * terms).all()


@SETTINGS
@given(problems(), st.integers(0, 2**31), st.booleans())
def test_bfloat16_is_computed_in_float32_and_rounded_once(problem, seed, wide):
    v, s, qn, qp = problem
    v = v if wide else v.bfloat16()
    incoming = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    q = kernel.quantize(v, s, qn, qp, torch.bfloat16)
    exact = v.float()
    assert torch.equal(q, ((exact / s).clamp(-qn, qp).round() * s).bfloat16())
    grad_v, grad_s = gradients(incoming, v, s, qn, qp)
    wanted_v, wanted_s = gradients(incoming.float(), exact, s, qn, qp)
    assert grad_v.dtype == v.dtype and torch.equal(grad_v.float(), wanted_v.to(v.dtype).float())
    assert grad_s.dtype == torch.float32 and torch.equal(grad_s, wanted_s)


@SETTINGS
@given(problems())
def test_integers_counted_from_the_lowest_are_those_of_the_values(problem):
    v, s, qn, qp = problem
    s = s.reshape(-1)[:1]
    counted, plain = integers(v, s, qn, qp), (v.double() / s.double()).float().clamp(-qn, qp).round() + qn
    assert counted.dtype == torch.uint8 and torch.equal(counted.float(), plain)
    assert torch.equal((counted.float() - qn) * s, lsq(v, s, qn, qp))
    kernel.use("plain")
    assert torch.equal(integers(v, s, qn, qp), counted)
    kernel.use("compiled")


def test_what_is_not_a_number_stays_so():
    v = torch.tensor([math.nan, math.inf, -math.inf, 0.3])
    assert lsq(v, torch.tensor(0.5), 2, 1).tolist()[1:] == [0.5, -1.0, 0.5]
    assert lsq(v, torch.tensor(0.5), 2, 1)[0].isnan()
    assert lsq(v.bfloat16(), torch.tensor(0.5), 2, 1)[0].isnan()
    assert gradients(torch.ones(4), v, torch.tensor(0.5), 2, 1)[1].isnan()


def test_the_sums_do_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    v, incoming, s = *torch.randn(2, 3, 70_001, generator=generator), torch.tensor(0.3)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(incoming, v, s, 8, 7)[1])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_gradient_that_others_may_use_is_left_as_it_is():
    v, incoming = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    given_before = incoming.clone()
    gradients(incoming, v, torch.tensor(0.3), 2, 1)
    assert torch.equal(incoming, given_before)


def test_a_gradient_that_lies_as_its_tensor_does_is_not_copied_whatever_the_stride_over_one_value():
    v, incoming = torch.randn(2, 6, 4, 1, 1), torch.randn(6, 1, 1, 4).permute(0, 3, 1, 2)
    assert incoming.stride() != v[0].stride()
    assert gradients(incoming, v[0], torch.tensor(0.3), 2, 1, may_overwrite=True)[0].data_ptr() == incoming.data_ptr()


# ---------------------------------------------------------------------------------------------------------------------
# Layers that quantize and operate at once.


def one_by_one(layer, x):
    """The layer's output by quantizing weight and input with the plain chain, then operating."""
    weight, activation = layer.weight, x
    quantize_weight, quantize_activation = layer.quan_w_fn, layer.quan_a_fn
    q = plain_chain(activation, *quantize_activation.quantization_parameters(activation))
    w = plain_chain(weight, *quantize_weight.quantization_parameters(weight))
    if isinstance(layer, nn.Linear):
        return F.linear(q, w, layer.bias)
    return F.conv2d(q, w, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def layers(per_channel):
    torch.manual_seed(0)
    for module, shape in [(nn.Conv2d(4, 6, 3, padding=1), (2, 4, 9, 9)),
                          (nn.Conv2d(4, 8, (3, 1), stride=2, dilation=(2, 1), groups=2, bias=False), (2, 4, 9, 9)),
                          (nn.Conv2d(6, 6, 3, groups=6), (3, 6, 5, 7)),
                          (nn.Linear(7, 5), (3, 7)), (nn.Linear(7, 5, bias=False), (2, 3, 7)), (nn.Linear(7, 5), (7,))]:
        channels = module.weight.shape[0] if per_channel else None
        kind = QuanLinear if isinstance(module, nn.Linear) else QuanConv2d
        layer = kind(module, LsqQuan([3], signed=True, channels=channels), LsqQuan([4], signed=True)).double().train()
        yield layer, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("wanted", ["compiled", "plain"])
def test_a_layer_at_once_equals_its_parts_one_by_one(layout, per_channel, wanted):
    kernel.use(wanted)
    for layer, x in layers(per_channel):
        layer = layer.to(memory_format=layout)
        x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
        x = x.requires_grad_()
        out = layer(x)  # the first call takes the initial step size of the activations, too
        assert layer.quan_a_fn.init_state.item() == 1
        expected = one_by_one(layer, x)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        incoming = torch.randn(out.shape, dtype=torch.float64)
        leaves = [x, *layer.parameters()]
        for ours, theirs in zip(torch.autograd.grad(out, leaves, incoming), torch.autograd.grad(expected, leaves, incoming),
                                strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wanted", ["compiled", "plain"])
def test_no_images_and_one_without_a_batch(wanted):
    kernel.use(wanted)
    for layer, x in layers(per_channel=False):
        layer(x)  # the steps have their values now
        if x.dim() > 1:
            out = layer(x[:0].requires_grad_())
            out.sum().backward()
            assert not out.numel() and not layer.weight.grad.any() and not layer.quan_a_fn.s.grad.any()
        if x.dim() == 4:
            torch.testing.assert_close(layer(x[0]), layer(x[:1])[0])


def test_a_layer_keeps_no_more_than_its_input_and_its_parameters():
    torch.manual_seed(0)
    layer = QuanConv2d(nn.Conv2d(8, 8, 3), LsqQuan([4], signed=True), LsqQuan([4], signed=False)).train()
    x, kept = torch.rand(4, 8, 20, 20).requires_grad_(), []

    def note(tensor):
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    assert known >= set(kept) and x.untyped_storage().data_ptr() in kept


def test_in_bfloat16_layers_compute_so_and_step_sizes_learn_in_float32():
    torch.manual_seed(0)
    for layer, x in layers(per_channel=False):
        layer, x = layer.float(), x.float().requires_grad_()
        exact = layer(x)
        exact_gradients = torch.autograd.grad(exact.sum(), [x, *layer.parameters()])
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03 * float(exact.detach().abs().max()))
        for got, wanted in zip(torch.autograd.grad(out.sum(), [x, *layer.parameters()]), exact_gradients, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()) + 1e-3)


def test_frozen_weights_get_no_gradient_and_their_steps_do():
    for layer, x in layers(per_channel=False):
        layer.weight.requires_grad_(False)
        layer(x).sum().backward()
        assert layer.weight.grad is None and layer.quan_w_fn.s.grad.abs().sum() > 0


def test_weights_are_quantized_once_while_they_cannot_change(monkeypatch):
    calls = []
    quantize = LsqQuan.quantize
    monkeypatch.setattr(LsqQuan, "quantize", lambda self, v: calls.append(v) or quantize(self, v))
    for layer, x in layers(per_channel=False):
        layer(x)
        layer.eval()
        calls.clear()
        with torch.no_grad(), weights_quantized_once(layer):
            kept = [layer(x) for _ in range(3)]
        assert sum(call is layer.weight for call in calls) == 1
        with torch.no_grad():
            layer.weight.neg_()
            changed = layer(x)
        assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], changed)
        with torch.no_grad(), weights_quantized_once(layer):
            assert torch.equal(layer(x), changed)


def test_an_operation_names_what_it_does():
    operation = Operation((0, 15, 1.0), (8, 7, 1.0), torch.float32, (None, None), None)
    q, weight, bias = torch.eye(2), torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])
    assert operation.of(q, weight, bias).tolist() == [[1.5], [2.5]]
    assert [part.tolist() for part in operation.gradients(torch.ones(2, 1), q, weight, True)] == [
        [[1.0, 2.0], [1.0, 2.0]], [[1.0, 1.0]], [2.0]]


@st.composite
def grouped_convolutions(draw):
    """(x, weight, geometry) of grouped convolutions, most of them depthwise and on maps smaller than the kernel."""
    kernel, strides, dilations = (draw(st.tuples(sides, sides)) for sides in map(st.integers, (1, 1, 1), (5, 3, 2)))
    reaches = [dilation * (side - 1) + 1 for dilation, side in zip(dilations, kernel, strict=True)]
    paddings = tuple(draw(st.integers(0, reach)) for reach in reaches)
    sides = [max(draw(st.integers(1, 6)), reach - 2 * padding) for reach, padding in zip(reaches, paddings, strict=True)]
    groups, inputs, outputs = draw(st.sampled_from([(3, 3, 3), (3, 3, 3), (3, 3, 6), (2, 4, 6), (1, 2, 1), (1, 1, 1)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(0, 3)), inputs, *sides, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs // groups, *kernel, generator=generator, dtype=torch.float64)
    return x, weight, (strides, paddings, dilations, groups)


@SETTINGS
@given(grouped_convolutions(), st.booleans())
def test_gradients_of_grouped_convolutions_are_those_of_autograd(problem, has_bias):
    x, weight, geometry = problem
    operation = Operation((0, 15, 1.0), (8, 7, 1.0), torch.float64, (None, None), geometry)
    parts = [x, weight, torch.ones(len(weight), dtype=torch.float64)][:2 + has_bias]
    out = F.conv2d(*(part.requires_grad_() for part in parts), *([] if has_bias else [None]), *geometry)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    expected = torch.autograd.grad(out, parts, grad)
    found = operation.gradients(grad, x.detach(), weight.detach(), has_bias)
    for ours, theirs in zip(found, expected, strict=False):
        torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Compiling.


def test_without_a_compiler_tensor_operations_take_over(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernel.use("auto")
    assert not kernel.is_compiled() and "no-such-compiler" in kernel.describe()
    with pytest.raises(UserError, match="kernels: found compiled, but .*no-such-compiler.*; install a C"):
        kernel.use("compiled")
    assert lsq(torch.tensor([0.9]), torch.tensor(0.5), 2, 1).item() == 0.5


@pytest.mark.parametrize("command", ["'c++", " ", "true", "false", "cat", "/"])
def test_what_is_no_compiler_does_no_harm(monkeypatch, tmp_path, command):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", command)
    kernel.use("auto")
    assert not kernel.is_compiled() and kernel.describe().startswith("tensor operations (")
    with pytest.raises(UserError, match="^kernels: found compiled, but "):
        kernel.use("compiled")
    assert not list(tmp_path.iterdir())


def test_a_library_that_lacks_a_function_is_not_used_at_all(monkeypatch):
    library = kernel._load()

    class Library:
        def __getattr__(self, name):
            return getattr(library, name if name != "differentiate_bfloat16_bfloat16" else "missing")

    monkeypatch.setattr(kernel, "_load", Library)
    kernel.use("auto")
    assert not kernel.is_compiled() and not kernel._differentiate and "missing" in kernel.describe()


def test_a_user_without_a_home_has_no_cache_but_compiled_loops(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(kernel.Path, "home", no_home)
    kernel.use("compiled")
    assert kernel.is_compiled()


def test_where_temporary_files_may_not_be_executed_the_cache_serves(monkeypatch, tmp_path):
    load = kernel.ctypes.CDLL

    def load_from_cache_only(path):
        if not path.startswith(str(tmp_path)):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel.ctypes, "CDLL", load_from_cache_only)
    kernel.use("compiled")
    assert kernel.is_compiled()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"{kernel.find_compiler()[0]} --no-such-flag")
    kernel.use("auto")
    assert not kernel.is_compiled() and "no-such-flag" in kernel.describe()


def test_a_cache_that_cannot_be_written_or_is_damaged_does_no_harm(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kernel.use("compiled")
    assert kernel.is_compiled()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernel.use("compiled")
    [library] = (tmp_path / "cache" / "limpqp").iterdir()
    damaged = tmp_path / "another" / "limpqp" / library.name  # where none is loaded from yet
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(library.read_bytes()[:1000])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    kernel.use("compiled")
    assert kernel.is_compiled() and damaged.read_bytes() == library.read_bytes()
