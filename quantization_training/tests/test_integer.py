"""Integer arithmetic: exact sums, each layer with what is fused into it beside float64, and whole networks beside float32."""

import copy
import pathlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_export import CONFIG, FILE, PACKED, PER_CHANNEL, SIGNED, complaint, images, write_checkpoint

import export
import integer_layer
import integer_network
import main
from integer_layer import CannotCompute, InputRange, IntegerLayer
from packed_file import PackedLayer
from packed_network import integer_weights
from quan.config import ActQuantizerConfig, ExceptedQuantizerConfig, ExceptionConfig, QuanConfig
from quan.func import QuantizedLayer
from quan.quantizer import integer_range
from util.datasets import read_digits
from util.errors import UserError

try:
    integer_layer.check_operators()
except CannotCompute as error:
    pytest.skip(str(error), allow_module_level=True)

ODD = """
import torch
import torch.nn.functional as F
from torch import nn

class Odd(nn.Module):
    '''Sums that are needed later, of broadcast parts, of one tensor with itself; layers called twice; inputs of any sign.'''

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 5, stride=2, padding=2)
        self.bn = nn.BatchNorm2d(7)
        self.a, self.b = nn.Conv2d(7, 7, (1, 3), padding=(0, 1)), nn.Conv2d(7, 7, 3, padding=2, dilation=2, bias=False)
        self.bn_b = nn.BatchNorm2d(7, affine=False)
        self.c, self.d = nn.Conv2d(7, 7, 1), nn.Conv2d(7, 5, 3, stride=(2, 1), padding="valid")
        self.down = nn.Conv2d(7, 7, 1, bias=False)
        self.head, self.last = nn.Linear(5, 9), nn.Linear(9, num_classes)
        self.pool = nn.MaxPool2d(2, 1)

    def forward(self, x):
        x = self.pool(F.relu(self.bn(self.stem(x))))
        y = self.bn_b(self.b(F.relu6(self.a(x))))
        y += x
        z = F.relu(self.c(y) + y)                # y is needed once more
        y = self.a(z) + self.down(y)             # a for the second time
        z = F.relu(self.c2(y)) if hasattr(self, "c2") else y + y.mean(1, keepdim=True)
        x = self.down(z).add_(z).relu_()         # down, too
        x = self.d(F.pad(x, (1, 1, 1, 1)))
        return self.last(F.gelu(self.head(x.mean((2, 3)))))

net = Odd
"""
FINE = {"weight_bits": 7, "act_bits": 8}  # as fine as integers can be, so that whatever is wrong is seen in the logits
CASES = {  # architecture, size of images, further arguments of write_checkpoint
    "residuals": ("resnet20", 16, {}), "residuals, signed, per channel": ("resnet20", 11, {"quan": SIGNED}),
    "pruned": ("resnet20", 9, {"sparsity": 0.7, "quan": PER_CHANNEL}),
    "depthwise": ("mobilenet_v2_tiny", 32, {"bits": FINE}), "attention": ("vit_tiny_patch4_32", 8, {}),
    "classifier": ("resnet20", 9, {"quan": QuanConfig(excepts={"conv1": ExceptionConfig(), "fc": ExceptionConfig(
        ExceptedQuantizerConfig(5), ExceptedQuantizerConfig(4))})}),
    "odd": ("net.py:net", 13, {"bits": FINE})}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("net.py").write_text(ODD)
    return tmp_path


@st.composite
def layers(draw):
    """(int8 weight, uint8 input, InputRange, geometry), often as large as a layer may have them."""
    groups, bits = draw(st.sampled_from([1, 1, 2, 4])), draw(st.integers(1, 8))
    act_bits = draw(st.integers(1, 15 - bits if bits > 7 else 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    inside, outside = draw(st.integers(1, 40)) * groups, draw(st.integers(1, 20)) * groups
    groups, inside, outside = draw(st.sampled_from([(groups, inside, outside), (inside, inside, inside)]))
    size = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    geometry = (draw(pair), draw(st.tuples(st.integers(0, 2), st.integers(0, 2))), draw(pair), groups)
    qn, qp = integer_range(act_bits, draw(st.booleans()) and act_bits > 1)
    shape, entering = [outside, inside // groups, *size], [draw(st.integers(1, 3)), inside, draw(st.integers(5, 9)), 5]
    if draw(st.booleans()):
        geometry, shape, entering = None, shape[:2], [*entering[2:], inside // groups]
    low, high = -2 ** (bits - 1), 2 ** (bits - 1) - 1
    weight = torch.randint(low, high + 1, shape, generator=generator)
    x = torch.randint(0, qn + qp + 1, entering, generator=generator)
    if draw(st.booleans()):
        weight, x = torch.where(weight < high / 2, low, high), torch.full_like(x, qn + qp)
    return weight.to(torch.int8), x.to(torch.uint8), InputRange(0.37, qn, qp), geometry


def sums(weight, x, entering, geometry):
    """In int64."""
    values = x.long() - entering.qn
    if geometry is None:
        return values @ weight.long().T
    return F.conv2d(values.double(), weight.double(), None, *geometry).long()  # far below 2^53


@settings(derandomize=True, deadline=None, max_examples=150)
@given(layers())
def test_sums_are_exact_for_all_integers_that_a_layer_may_have(case):
    weight, x, entering, geometry = case
    layer = IntegerLayer(weight, torch.full([len(weight)], 1 / 0.37), None, entering, geometry)
    exact = sums(weight, x, entering, geometry)
    torch.testing.assert_close(layer(x).double(), exact.double(), rtol=1e-6, atol=1e-6)
    column = [1, -1, *[1] * (exact.dim() - 2)] if geometry else [-1]
    steps, residual = 1 - 2.0 * (torch.arange(len(weight)) % 2), torch.rand(exact.shape)  # that of a BatchNorm may be negative
    layer = IntegerLayer(weight, steps, torch.ones(len(weight)), entering, geometry)
    wanted = exact.double() * 0.37 * steps.view(column) + 1 + residual
    torch.testing.assert_close(layer(x, residual.clone()).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_kernel_of_one_pixel_adds_to_the_residual_in_pieces_and_skips_pixels(monkeypatch):
    monkeypatch.setattr(integer_layer, "SUMMED_VALUES", 7 * 8)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (8, 12, 1, 1), dtype=torch.int8, generator=generator)
    x = torch.randint(0, 16, (2, 12, 9, 8), dtype=torch.uint8, generator=generator)
    geometry = (2, 3), (0, 0), (1, 1), 1
    entering, residual = InputRange(0.5, 8, 7), torch.rand(2, 8, 5, 3, generator=generator)
    wanted = sums(weight, x, entering, geometry) * 0.5 + 1 + residual.double()
    for form in (torch.contiguous_format, torch.channels_last):
        layer = IntegerLayer(weight, torch.ones(8), torch.ones(8), entering, geometry)
        found = layer(x.contiguous(memory_format=form), residual.clone(memory_format=form))
        assert layer.by_rows
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_what_may_exceed_16_or_32_bits_is_left_in_float():
    for bits in range(1, 9):
        for acts in range(1, 9):
            worst = 2 * (2**acts - 1) * 2 ** (bits - 1)  # of two products
            row = PackedLayer("linear", (4, 10), bits, True, acts, False, True, 0)
            assert bool(row.why_float) == (worst > 2**15 - 1) == (bits + acts > 15)
    for bits, acts, length in ((7, 8, 2**31 // (64 * 255)), (2, 2, 2**31 // 6), (1, 8, 2**31 // 255)):
        fits, exceeds = (PackedLayer("linear", (1, count), bits, True, acts, True, True, 0) for count in (length, length + 1))
        assert length * (2**acts - 1) * 2 ** (bits - 1) < 2**31
        assert not fits.why_float and "32 bits" in exceeds.why_float
    assert "not quantized" in PackedLayer("conv", (1, 1, 1, 1), 3, True, None, None, True, 0).why_float


def alive(network, size):
    """A PolicyNetwork with the BatchNorm statistics of a batch, without which its logits hardly depend on the image."""
    for module in network.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.model.train()(images(size, 16))
    network.model.eval()
    return network


def made(case):
    """(PolicyNetwork, its network of integers, size of images)"""
    arch, size, options = CASES[case]
    network = alive(write_checkpoint(arch, size, **options), size)
    return network, integer_network.computed(network, "integer", FILE)[0], size


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("shallow")
def test_a_network_of_integers_gives_the_logits_of_float32_but_for_rounding_edges(case):
    network, integer, size = made(case)
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    for batch in (1, 9):
        x = images(size, batch)
        with torch.no_grad():
            expected, found = network.model(x), integer(x)
        assert batch == 1 or expected.std(0).max() > 0.03 * expected.abs().max()
        same = ((found - expected).abs().amax(1) <= 1e-4 * expected.abs().max())
        assert same.float().mean() > 0.85
        assert export.is_rounding(export.difference(expected, found), expected, network.model, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.model.state_dict().items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("shallow")
def test_each_layer_with_what_is_fused_into_it_equals_float64_from_the_same_input(case):
    network, integer, size = made(case)
    calls, fused = [], 0
    for name, module in integer.named_modules():
        if isinstance(module, IntegerLayer):
            module.register_forward_pre_hook(lambda module, inputs, name=name: calls.append(
                [name, module, *[tensor.clone() for tensor in inputs]]))
            module.register_forward_hook(lambda module, inputs, output: calls[-1].append(output.clone()))
    with torch.no_grad():
        integer(images(size, 3))
    assert len({name for name, *_ in calls}) == sum(isinstance(module, QuantizedLayer) and not integer_layer.why_float(module)
                                                   for module in network.model.modules())
    for name, module, x, *residual, output in calls:
        batchnorm = next((other for other, layer in network.graph.batchnorms.items() if layer == name), None)
        is_folded = batchnorm is not None and batchnorm not in dict(integer.named_modules())
        wanted = in_float64(network.model.get_submodule(name), x,
                            network.model.get_submodule(batchnorm) if is_folded else None)
        wanted = wanted + sum(part.double() for part in residual)
        wanted = wanted.clamp(*module.limits)
        compare(output, wanted, module.leaving)
        fused += is_folded + (module.activation != "none") + len(residual) + (module.leaving is not None)
    assert case != "attention" or any(node.target is torch.ops.aten.gelu_.default for node in integer.graph.nodes)
    assert fused == {"attention": 6, "odd": 2, "depthwise": 55}.get(case, 14)


@torch.no_grad()
def in_float64(layer, x, batchnorm):
    """What a quantized layer, and a BatchNorm, make of the integers of x, or of x."""
    twin, quantizer = copy.deepcopy(layer).double(), layer.quan_a_fn
    if x.dtype == torch.uint8:
        values = (x.double() - quantizer.quantization_range[0]) * quantizer.step.double()
    else:
        values = quantizer.quantize(x).double()
    step = layer.quan_w_fn.step.double()
    weight = torch.from_numpy(integer_weights(layer, "")).double() * step.view(-1, *[1] * (layer.weight.dim() - 1))
    if getattr(layer, "sat", False):  # arXiv 1912.10207
        weight = weight / (len(weight) ** 0.5 * weight.std())
    y = twin._conv_forward(values, weight, twin.bias) if layer.weight.dim() == 4 else F.linear(values, weight, twin.bias)
    return y if batchnorm is None else copy.deepcopy(batchnorm).double().eval()(y)


def compare(found, wanted, leaving):
    if leaving is None:
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        return
    scaled = wanted / leaving.step
    is_edge = ((scaled - scaled.floor() - 0.5).abs() < 1e-4) & (scaled > -leaving.qn - 1) & (scaled < leaving.qp + 1)
    integers = scaled.clamp(-leaving.qn, leaving.qp).round() + leaving.qn
    assert torch.equal(found[~is_edge].double(), integers[~is_edge]) and is_edge.float().mean() < 0.01


OTHERS = """
import torch
from torch import nn

class Branching(nn.Sequential):
    def forward(self, x):
        x = super().forward(x)
        return x + 1 if x.sum() > 0 else x

class Noisy(nn.Sequential):
    def forward(self, x):
        return super().forward(x + torch.rand(1, 1, 8, 8))

class Two(nn.Sequential):
    def forward(self, x):
        return super().forward(x), x

class Sums(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)
        self.a, self.b, self.c, self.d, self.g, self.h, self.i, self.c2, self.d2 = (nn.Conv2d(4, 4, 1) for _ in range(9))
        self.bn = nn.BatchNorm2d(4)
        self.e, self.f = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image):
        x = self.stem(nn.functional.pad(image, (1, 1, 1, 1)))
        x = self.a(x) + x.mean((2, 3), keepdim=True)    # broadcast
        x = torch.add(self.b(x), x, alpha=0.5)
        y = x.flatten(1)
        x = self.c(x) + x                               # which is needed once more, under another name
        x = x + y.view_as(x)
        v = x.flatten(1).view_as(x)
        x = self.i(v) + v + x                           # the first sum is one with what has another name
        x = self.c2(x) + x, self.d2(x)                  # which another layer needs later
        x = self.f(self.e(x[0] + x[1]) + image)         # the image is the caller's
        x = self.bn(self.g(x)) + self.bn(self.h(x))     # of two layers, the later one can add the earlier one's
        x = 0.5 + self.d(x)
        return self.head(nn.functional.relu(x, inplace=True).mean((2, 3)) - x.amax((2, 3)))

class Names(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * self[2].weight.mean()

def layers(num_classes):
    return (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1, stride=2), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, num_classes))

def branching(num_classes):
    return Branching(*layers(num_classes))

def noisy(num_classes):
    return Noisy(*layers(num_classes))

def two(num_classes):
    return Two(*layers(num_classes))

sums = Sums

def hooked(num_classes):
    network = nn.Sequential(*layers(num_classes)[:3], nn.Conv2d(4, 4, 1), *layers(num_classes)[3:])
    network[3].register_forward_hook(lambda module, inputs, output: output.abs())
    return network

def grouped(num_classes):
    return nn.Sequential(*layers(num_classes)[:3], nn.Conv2d(4, 4, 3, groups=2), *layers(num_classes)[3:])

def names(num_classes):
    return Names(*layers(num_classes))

def overwriting(num_classes):
    return nn.Sequential(nn.ReLU(inplace=True), *layers(num_classes))

class Through(nn.Module):
    def __init__(self, forward, num_classes, **layers):
        super().__init__()
        self.steps, self.stem, self.head = forward, nn.Conv2d(3, 8, 1), nn.Linear(8, num_classes)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.head(self.steps(self, x))

def mixing(num_classes):
    return Through(lambda net, x: net.bn(net.mix(net.stem(x))).mean((2, 3)), num_classes, mix=nn.Linear(8, 8),
                   bn=nn.BatchNorm2d(8))

def single(num_classes):
    def steps(net, x):
        y = net.a(net.stem(x)[0])
        return net.c(net.stem(x)).mean((2, 3)) + net.v((net.b(y) + y).mean((1, 2)))
    return Through(steps, num_classes, **{name: nn.Conv2d(8, 8, 1) for name in "abc"}, v=nn.Linear(8, 8))

def asking(num_classes):
    def steps(net, x):
        total = net.a.weight.sum()
        return net.bn(net.a(net.stem(x))).mean((2, 3)) * total
    return Through(steps, num_classes, a=nn.Conv2d(8, 8, 1), bn=nn.BatchNorm2d(8))

def biased(num_classes):
    return Through(lambda net, x: net.bn(net.a(net.stem(x))).mean((2, 3)) + net.a.bias, num_classes, a=nn.Conv2d(8, 8, 1),
                   bn=nn.BatchNorm2d(8))

def biased_stem(num_classes):
    return Through(lambda net, x: net.a(net.bn(net.stem(x))).mean((2, 3)) + net.stem.bias, num_classes,
                   a=nn.Conv2d(8, 8, 1), bn=nn.BatchNorm2d(8))

class Add(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, num_classes)

    def forward(self, add):
        return self.head((self.a(add) + add).mean((2, 3)))

add = Add
"""


def compare_logits(found, expected):
    """Of networks with fine steps: what is wrong changes more, what is rounded to the other integer less."""
    assert len(found) == 1 or expected.std(0).max() > 1e-3
    assert ((found - expected).abs() <= 0.01 * expected.abs().amax(0)).all()


@pytest.mark.parametrize("factory", ["branching", "noisy", "overwriting", "two", "hooked", "grouped"])
def test_odd_networks_are_computed_with_integers_too(factory):
    """Some as a graph, others, which no graph stands for, layer by layer."""
    pathlib.Path("net.py").write_text(OTHERS)
    network = alive(write_checkpoint(f"net.py:{factory}", 8, bits=FINE), 8)
    integer, how = integer_network.computed(network, "integer", FILE)
    assert isinstance(integer, torch.fx.GraphModule) == (factory in ("overwriting", "two", "grouped"))
    assert "3 (it has hooks)" in how or factory != "hooked"
    assert "3 (oneDNN has no fast kernel for groups of so many channels)" in how or factory != "grouped"
    assert how.startswith("integer arithmetic in 1 of") and "it pads with something else" in how
    assert [name for name, module in integer.named_modules() if isinstance(module, IntegerLayer)] == [
        "3" if factory == "overwriting" else "2"]
    for batch in (1, 5):
        x = images(8, batch)
        before = x.clone()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            expected = network.model(x)
            torch.manual_seed(0)
            compare_logits(integer(x), expected)
        assert torch.equal(x, before)


def test_sums_that_something_else_needs_are_not_overwritten():
    pathlib.Path("net.py").write_text(OTHERS)
    network = alive(write_checkpoint("net.py:sums", 8, bits=FINE), 8)
    with torch.no_grad():
        network.model.h.quan_a_fn.s.mul_(0.6)  # of one input, g and h take different integers
    integer, _ = integer_network.computed(network, "integer", FILE)
    assert [node.target for node in integer.graph.nodes if len(node.args) == 2 and node.op == "call_module"] == ["d2", "h"]
    x = images(8, 5)
    before = x.clone()
    with torch.no_grad():
        compare_logits(integer(x), network.model(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize(("factory", "layers"), [
    ("mixing", 1), ("single", 4), ("asking", 0), ("biased", 0), ("biased_stem", 1), ("add", 1)])
def test_what_goes_into_the_last_layer_is_right_where_dimensions_or_names_are_unusual(factory, layers):
    """A linear layer before a BatchNorm2d; inputs without a batch; weights and biases that the network asks for; an image
    called as additions are."""
    pathlib.Path("net.py").write_text(OTHERS)
    names = {"add": ("head",)}.get(factory, ("stem", "head"))
    quan = QuanConfig(act=ActQuantizerConfig(all_positive=False), excepts={name: ExceptionConfig() for name in names})
    network = alive(write_checkpoint(f"net.py:{factory}", 8, bits=FINE, quan=quan), 8)
    integer, _ = integer_network.computed(network, "auto", FILE)
    assert sum(isinstance(module, IntegerLayer) for module in integer.modules()) == layers
    entering = []
    for model in {network.model, integer}:
        model.get_submodule("head").register_forward_pre_hook(lambda _, inputs, model=model: entering.append(
            (model is integer, inputs[0].clone())))
    for batch in (1, 4):
        x, entering[:] = images(8, batch).to(memory_format=torch.channels_last), []
        before = x.clone()
        with torch.no_grad():
            network.model(x), integer(x)
        found, expected = (next(value for is_integer, value in entering if is_integer == side or layers == 0)
                           for side in (True, False))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        assert torch.equal(x, before)


def test_a_network_that_asks_its_layers_for_weights_is_computed_in_float():
    pathlib.Path("net.py").write_text(OTHERS)
    network = write_checkpoint("net.py:names", 8)
    assert "float arithmetic (the network fails once its layers are integer" in integer_network.computed(
        network, "auto", FILE)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Commands.


@pytest.mark.usefixtures("shallow")
def test_digits_are_classified_as_in_float_by_the_commands_and_from_python(capsys):
    pathlib.Path("config.yaml").write_text(CONFIG)
    main.main(["config.yaml"])
    export.main(["results/run/run_checkpoint.pth.tar", "--output", PACKED])
    capsys.readouterr()
    said = {}
    for arithmetic in integer_network.ARITHMETIC:
        main.main(["config.yaml", "eval=true", f"resume.path={PACKED}", f"arithmetic={arithmetic}"])
        said[arithmetic] = capsys.readouterr().out.splitlines()[-2:]
    assert said["float"][0] == f"{PACKED}: a packed model, float arithmetic"
    assert said["auto"] == said["integer"] and said["auto"][0] == (
        f"{PACKED}: a packed model, integer arithmetic in 6 of 8 layers; in float: conv1 (its input is not quantized); fc (8 "
        "by 8 bits: two products may exceed 16 bits)")
    pixels = read_digits(16)[1].images
    x = ((pixels.float() - pixels.float().mean()) / pixels.float().std()).expand(-1, 3, -1, -1).contiguous()
    exact, integer = (integer_network.load(PACKED, arithmetic) for arithmetic in ("float", "auto"))
    with torch.no_grad():
        expected, found = exact(x), integer(x)
    assert export.is_rounding(export.difference(expected, found), expected, exact, x)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.97  # the other images lie on a rounding edge
    Image.fromarray(pixels[0, 0].numpy()).save("a.png")
    export.main(["--predict", PACKED, "a.png"])
    integers = capsys.readouterr().out
    export.main(["--predict", PACKED, "a.png", "--arithmetic", "float"])
    assert capsys.readouterr().out.split(" (")[0] == integers.split(" (")[0]


def test_where_integers_cannot_compute_auto_computes_in_float_and_integer_refuses(capsys, monkeypatch):
    network = write_checkpoint("net.py:net", 13)
    export.main([FILE, "--output", PACKED, "--arch", "net.py:net"])
    x = images(13, 2)
    with torch.no_grad():
        expected = network.model(x)
    eight = write_checkpoint("net.py:net", 13, path="eight", bits={"weight_bits": 8, "act_bits": 8})
    assert "float arithmetic (no layer fits: stem (" in integer_network.computed(eight, "auto", "eight")[1]
    with pytest.raises(UserError, match="arithmetic: found integers, allowed are auto, integer, float"):
        integer_network.load(PACKED, "integers", "net.py:net")
    for why in ("for x86 CPUs", "no integer operators", "fail here", "add up wrongly"):
        with monkeypatch.context() as patch:
            integer_layer.check_operators.cache_clear()
            spoil(patch, why)
            integer = integer_network.load(PACKED, "auto", "net.py:net")
            with torch.no_grad():
                assert torch.equal(integer(x), expected)
            Image.new("L", (13, 13)).save("a.png")
            said = complaint(capsys, export.main, "--predict", PACKED, "a.png", "--arithmetic", "integer", "--arch",
                             "net.py:net")
            assert "arithmetic: found integer, but " in said and why in said
    integer_layer.check_operators.cache_clear()


def spoil(patch, why):
    """Let the operators be as they are on other machines."""
    if why == "for x86 CPUs":
        patch.setattr(integer_layer.platform, "machine", lambda: "aarch64")
    elif why == "no integer operators":
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif why == "fail here":
        patch.setattr(IntegerLayer, "_multiply", lambda *_: torch.zeros(2, 3) @ torch.zeros(4, 5))
    else:
        patch.setattr(IntegerLayer, "forward", lambda *_: torch.tensor([2.0**15 - 1]))


def test_a_checkpoint_is_not_evaluated_with_integers(capsys):
    write_checkpoint("net.py:net", 13)
    pathlib.Path("config.yaml").write_text(CONFIG.replace("16", "13"))
    assert "arithmetic: found integer, which takes a packed file" in complaint(
        capsys, main.main, "config.yaml", "arch=net.py:net", "eval=true", f"resume.path={FILE}", "arithmetic=integer",
        "weight_bits=", "act_bits=")
