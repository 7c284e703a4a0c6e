"""Decomposed attention against torch's and torchvision's own modules: outputs, gradients, names of weights."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from model import create_model, load_weights
from model.attention import SelfAttention, decompose_attention
from model.layer_table import trace
from quan.config import ActQuantizerConfig, QuanConfig
from quan.func import QuanLinear
from quan.utils import joint_modules, replace_module_by_names
from util.errors import UserError

CLOSE = {torch.float32: {"atol": 1e-6, "rtol": 1e-5}, torch.float64: {"atol": 1e-12, "rtol": 1e-12}}
# Sums over all tokens, in another order.
CLOSE_SUMS = {torch.float32: {"atol": 2e-5, "rtol": 1e-4}, torch.float64: {"atol": 1e-12, "rtol": 1e-10}}


class Holder(nn.Module):
    """Gives a module a name."""

    def __init__(self, module):
        super().__init__()
        self.inner = module


def decomposed(module):
    """The module decomposed, with parameters of its own."""
    return decompose_attention(Holder(copy.deepcopy(module))).inner


def gradients(outputs, module, *inputs):
    """Gradients of a fixed weighting of the outputs, for the inputs and, by torch's names, for the parameters."""
    weighting = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view(outputs.shape)
    found = torch.autograd.grad((outputs * weighting).sum(), [*inputs, *module.parameters()], allow_unused=True)
    names = [name.replace("in_proj.", "in_proj_") for name, _ in module.named_parameters()]
    return [*found[:len(inputs)]], dict(zip(names, found[len(inputs):], strict=True))


def assert_same(original, ours, call, *inputs, dtype):
    outputs = [call(module) for module in (original, ours)]
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE[dtype])
    (theirs_in, theirs), (ours_in, mine) = (gradients(out, module, *inputs)
                                            for out, module in zip(outputs, (original, ours), strict=True))
    torch.testing.assert_close(ours_in, theirs_in, **CLOSE_SUMS[dtype])
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, **CLOSE_SUMS[dtype], msg=lambda text, name=name: f"{name}: {text}")


def multihead(dtype=torch.float64, **options):
    torch.manual_seed(1)
    module = nn.MultiheadAttention(12, 3, **options).to(dtype)
    for parameter in module.parameters():  # biases begin at zero
        nn.init.normal_(parameter, std=0.3)
    return module


MASKS = {
    "none": {}, "boolean": {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    "added": {"attn_mask": torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)},
    "causal": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True},
    "by head": {"attn_mask": torch.linspace(-1, 1, 150, dtype=torch.float64).view(6, 5, 5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False, False, False, True, True]])},
    "both": {"attn_mask": torch.ones(5, 5).triu(2).bool(),
             "key_padding_mask": torch.tensor([[False] * 5, [False, False, True, True, True]])}}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_masks_layouts_and_weights_are_those_of_the_original(masks, batch_first, need_weights):
    original = multihead(batch_first=batch_first)
    ours = decomposed(original)
    x = torch.randn(*((2, 5) if batch_first else (5, 2)), 12, dtype=torch.float64, requires_grad=True)
    assert isinstance(ours, SelfAttention) and type(ours.in_proj) is type(ours.out_proj) is nn.Linear
    assert_same(original, ours, lambda module: module(x, x, x, need_weights=need_weights, **MASKS[masks])[0], x,
                dtype=torch.float64)
    weights = [module(x, x, x, need_weights=need_weights, **MASKS[masks])[1] for module in (original, ours)]
    if need_weights:
        torch.testing.assert_close(weights[1], weights[0])
    else:
        assert weights == [None, None]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("bias", [True, False])
def test_float32_is_the_same_to_1e_6_with_and_without_bias(dtype, bias):
    original = multihead(dtype, bias=bias, batch_first=True)
    x = torch.randn(3, 17, 12, dtype=dtype, requires_grad=True)
    assert_same(original, decomposed(original), lambda module: module(x, x, x, need_weights=False)[0], x, dtype=dtype)


def test_without_a_batch_and_weights_of_every_head():
    original = multihead()
    x = torch.randn(5, 12, dtype=torch.float64)
    for options in ({}, {"average_attn_weights": False}, {"key_padding_mask": torch.tensor([False] * 4 + [True])}):
        for theirs, ours in zip(original(x, x, x, **options), decomposed(original)(x, x, x, **options), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_attention_is_drawn_alike(need_weights):
    original = multihead(dropout=0.5, batch_first=True)
    ours, x, outputs = decomposed(original), torch.randn(2, 5, 12, dtype=torch.float64), []
    for module in (original.train(), ours.train()):
        torch.manual_seed(3)
        outputs.append(module(x, x, x, need_weights=need_weights)[0])
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[1], ours.eval()(x, x, x)[0])


class Between(nn.Module):
    """Attends within the image's tokens, and from a query of its own to them."""

    def __init__(self, attention, both=False):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.within, self.between = attention, copy.deepcopy(attention)
        self.query = nn.Parameter(torch.randn(1, 1, 12, dtype=torch.float32))
        self.fc = nn.Linear(12, 4)
        self.both = both

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.within(x, x, x)[0]
        query = self.query.expand(len(x), -1, -1)
        attention = self.within if self.both else self.between
        return self.fc(attention(query, x, x)[0].squeeze(1))


def test_attention_between_two_inputs_is_left_in_full_precision_and_named():
    torch.manual_seed(0)
    original = Between(multihead(torch.float32, batch_first=True))
    ours, x = decompose_attention(copy.deepcopy(original)), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours(x), original(x), **CLOSE[torch.float32])
    graph = trace(ours, 8, 4)
    assert list(graph.layers) == ["patches", "within.in_proj", "within.out_proj", "between.out_proj", "fc"]
    assert "between.in_proj.weight" in graph.uncounted and "between.in_proj.weight" in graph.describe()
    with pytest.raises(UserError, match="the attention within is used within one input and between two"):
        trace(decompose_attention(Between(multihead(torch.float32, batch_first=True), both=True)), 8)


class Derived(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize("module", [
    nn.MultiheadAttention(12, 3, kdim=8, vdim=8), nn.MultiheadAttention(12, 3, add_bias_kv=True),
    nn.MultiheadAttention(12, 3, add_zero_attn=True), Derived(12, 3)])
def test_what_cannot_be_taken_apart_is_left_as_it_is(module):
    model = Holder(module)
    assert decompose_attention(model).inner is module


WINDOWS = [([4, 4], [0, 0], (8, 8)), ([4, 4], [2, 2], (8, 8)), ([4, 4], [2, 2], (7, 9)), ([4, 3], [2, 1], (9, 7)),
           ([7, 7], [3, 3], (5, 5)), ([4, 4], [2, 2], (4, 10)), ([4, 4], [0, 2], (8, 8))]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize(("window", "shift", "sides"), WINDOWS)
def test_window_attention_is_torchvisions(kind, window, shift, sides, dtype):
    torch.manual_seed(0)
    original = kind(12, list(window), list(shift), 3).to(dtype).eval()
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = decomposed(original)
    assert type(ours) is not kind and ours.state_dict().keys() == original.state_dict().keys()
    x = torch.randn(2, *sides, 12, dtype=dtype, requires_grad=True)
    assert_same(original, ours, lambda module: module(x), x, dtype=dtype)


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
def test_window_attention_without_biases(kind):
    torch.manual_seed(0)
    original = kind(12, [4, 4], [2, 2], 3, qkv_bias=False, proj_bias=False).double()
    x = torch.randn(2, 8, 8, 12, dtype=torch.float64, requires_grad=True)
    assert_same(original, decomposed(original), lambda module: module(x), x, dtype=torch.float64)


def randomised(model):
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize(("arch", "size"), [("vit_tiny_patch4_32", 16), ("swin_t", 32)])
def test_a_whole_network_answers_like_torchvisions_with_its_weights_loaded_by_name(arch, size):
    if arch == "swin_t":
        original = torchvision.models.swin_t(num_classes=10)
    else:
        original = VisionTransformer(size, 4, 6, 3, 192, 768, num_classes=10)
    original = randomised(original).eval()
    state = original.state_dict()
    assert any("in_proj_weight" in name for name in state) == arch.startswith("vit")
    ours = create_model(arch, 10, input_size=size).eval()
    assert load_weights(ours, state, "file")
    x = torch.randn(2, 3, size, size)
    torch.testing.assert_close(ours(x), original(x), atol=1e-6, rtol=1e-5)
    assert not [name for name in trace(ours, size, 10).uncounted if "proj" in name and "conv" not in name]
    torch.testing.assert_close(ours.double()(x.double()), original.double()(x.double()), atol=1e-12, rtol=1e-12)


def test_query_key_and_value_are_one_searchable_layer():
    model = create_model("vit_tiny_patch4_32", 10, input_size=8)
    layers = trace(model, 8, 10).layers
    block = "encoder.layers.encoder_layer_0"
    assert [name for name in layers if name.startswith(block)] == [
        f"{block}.self_attention.in_proj", f"{block}.self_attention.out_proj", f"{block}.mlp.0", f"{block}.mlp.3"]
    assert layers[f"{block}.self_attention.in_proj"].shape == (576, 192)
    assert layers[f"{block}.self_attention.in_proj"].macs_exact == 576 * 192 * 5  # four patches and the class token


class Encoder(nn.Module):
    """torch's own transformer encoder, which without gradients hands all weights to one function."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        padding[:, -1] = True
        return self.fc(self.encoder(x, src_key_padding_mask=padding)[:, :-1].mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_own_transformer_layers_use_their_quantizers_in_evaluation_too():
    torch.manual_seed(0)
    original = Encoder().eval()
    model, x = decompose_attention(copy.deepcopy(original)), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), atol=1e-6, rtol=1e-5)
    graph = trace(model, 8, 4)
    assert len(graph.layers) == 10
    quan = QuanConfig(act=ActQuantizerConfig(all_positive=False), excepts={})
    replace_module_by_names(model, joint_modules(model, graph, quan, [4]))
    reached = []
    for name, module in model.named_modules():
        if isinstance(module, QuanLinear):
            module.quan_w_fn.register_forward_hook(lambda *_, name=name: reached.append(name))
    with torch.no_grad():
        model(x)
    assert set(reached) == {name for name, call in graph.layers.items() if call.kind == "linear"}
