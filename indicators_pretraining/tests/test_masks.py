"""Pruning masks against plain lists, what holds them in force, and what is counted with them."""

import itertools
import math
import types
from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import indicators
from model import create_model
from model.layer_table import trace
from quan.cost import full_precision_cost, nonzero_macs, policy_cost, sparse_size
from quan.func import ExceptedBatchNorm, SwitchableBatchNorm
from quan.quantizer import LsqQuan
from sparsity.masks import PrunedParameters, checked_masks, weights_left
from sparsity.ranking import Prunable, count_to_remove, coupled_parameters, next_masks, prunable_layers
from util.errors import UserError

FOLLOWERS = ("bias", "bn")


@st.composite
def pruned_layers(draw):
    """(weights, masks) of one to three layers: small whole numbers, so that many are equal, and zero where pruned."""
    weights, masks = {}, {}
    for index in range(draw(st.integers(1, 3))):
        shape = draw(st.sampled_from([(1, 1), (2, 3), (5, 1), (4, 2, 1, 2), (3, 1, 2, 2)]))
        count = math.prod(shape)
        values = draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))
        kept = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=count, max_size=count)))
        name = f"layer{index}"
        weights[name] = torch.tensor(values, dtype=torch.float32).view(shape)
        if kept is not None:
            masks[f"{name}.weight"] = torch.tensor(kept).view(shape)
            weights[name] *= masks[f"{name}.weight"]
    return weights, masks


SHARES = st.integers(1, 99).map(lambda percent: percent / 100)


def half_up(value):
    return int(value.quantize(Decimal(1), ROUND_HALF_UP))


def expected_units(weights, masks, kind, scope, amount, target):
    """{layer: [whether each unit stays]} after the smallest went one by one, written with lists."""
    scores, left = {}, {}
    for name, weight in weights.items():
        rows = weight.flatten(1).tolist()
        kept = masks.get(f"{name}.weight", torch.ones_like(weight, dtype=torch.bool)).flatten(1).tolist()
        if kind == "structured":
            scores[name], left[name] = [sum(value**2 for value in row) for row in rows], [any(row) for row in kept]
        else:
            scores[name] = [abs(value) for row in rows for value in row]
            left[name] = [value for row in kept for value in row]
    for group in [list(weights)] if scope == "global" else [[name] for name in weights]:
        total, remaining = sum(len(left[name]) for name in group), sum(sum(left[name]) for name in group)
        count = half_up(Decimal(str(amount)) * remaining)
        if target is not None:
            count = min(count, half_up(Decimal(str(target)) * total) - (total - remaining))
        queue = [(scores[name][position], order, position, name) for order, name in enumerate(group)
                 for position in range(len(left[name])) if left[name][position]]
        for _, _, position, name in sorted(queue):
            if count > 0 and (kind == "unstructured" or sum(left[name]) > 1):
                left[name][position] = False
                count -= 1
    return left


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("kind", ["unstructured", "structured"])
@given(layers=pruned_layers(), amount=st.one_of(SHARES, st.just(1)), target=st.one_of(st.none(), SHARES))
def test_the_smallest_go_as_counted_with_lists(kind, scope, layers, amount, target):
    weights, masks = layers
    before = {name: mask.clone() for name, mask in masks.items()}
    coupled = {name: [f"{name}.{entry}" for entry in FOLLOWERS] for name in weights}
    found = next_masks(weights, masks, coupled, kind, scope, amount, target)
    assert all(torch.equal(mask, before[name]) for name, mask in masks.items()), "the masks given were changed"
    wanted = expected_units(weights, masks, kind, scope, amount, target)
    for name, weight in weights.items():
        mask = found[f"{name}.weight"]
        assert mask.shape == weight.shape and mask.dtype == torch.bool
        if kind == "unstructured":
            assert mask.flatten().tolist() == wanted[name]
            continue
        old = before.get(f"{name}.weight", torch.ones_like(weight, dtype=torch.bool))
        for channel, stays in enumerate(wanted[name]):
            assert torch.equal(mask[channel], old[channel] if stays else torch.zeros_like(old[channel]))
        for entry in FOLLOWERS:
            assert found[f"{name}.{entry}"].tolist() == wanted[name]
    expected_names = {f"{name}.weight" for name in weights}
    if kind == "structured":
        expected_names |= {name for names in coupled.values() for name in names}
    assert set(found) == expected_names


@given(kind=st.sampled_from(["unstructured", "structured"]), scope=st.sampled_from(["global", "layer"]), amount=SHARES,
       seed=st.integers(0, 100))
def test_level_by_level_nothing_comes_back_and_the_sparsity_is_the_formula_s(kind, scope, amount, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(size, 2, generator=generator) for name, size in (("a", 300), ("b", 701))}
    masks, coupled = {}, {"a": ["a.bn"], "b": []}
    units = {name: weight.shape[0] if kind == "structured" else weight.numel() for name, weight in weights.items()}
    for level in range(1, 5):
        grown = next_masks(weights, masks, coupled, kind, scope, amount)
        assert all(not (grown[name] & ~mask).any() for name, mask in masks.items())
        masks = grown
        counts = {name: int(masks[f"{name}.weight"].any(1).sum() if kind == "structured" else masks[f"{name}.weight"].sum())
                  for name in weights}
        groups = [["a", "b"]] if scope == "global" else [["a"], ["b"]]
        for group in groups:
            left, exact = sum(counts[name] for name in group), sum(units[name] for name in group) * (1 - amount) ** level
            # each level rounds by half a unit at most; what it was off by before shrinks with the rest
            error = 0.5 * sum((1 - amount) ** passed for passed in range(level)) + 1e-9
            assert abs(left - exact) <= error or kind == "structured" and left <= len(group)
        assert min(counts.values()) >= 1 or kind == "unstructured"


def test_counts_are_whole_and_halves_go_up():
    assert [count_to_remove(1000, left, 0.2) for left in (1000, 800, 640, 512, 410)] == [200, 160, 128, 102, 82]
    assert count_to_remove(5, 5, 0.1) == 1 and count_to_remove(4, 4, 0.1) == 0
    assert count_to_remove(45, 45, 0.7) == 32  # 31.5, which is below in floating point
    assert count_to_remove(100, 100, 1, 0.5) == 50 and count_to_remove(100, 40, 1, 0.5) == 0


def test_of_equal_ones_the_earlier_goes():
    weights = {"b": torch.ones(2, 2), "a": -torch.ones(3, 2)}
    masks = next_masks(weights, {}, {"a": [], "b": []}, "unstructured", "global", 0.5)
    assert masks["b.weight"].tolist() == [[False, False], [False, False]]
    assert masks["a.weight"].tolist() == [[False, True], [True, True], [True, True]]
    masks = next_masks(weights, {}, {"a": ["a.bias"], "b": []}, "structured", "layer", 0.6)
    assert masks["b.weight"].tolist() == [[False, False], [True, True]]
    assert masks["a.bias"].tolist() == [False, False, True]


def test_norms_that_single_precision_cannot_tell_apart_are_no_ties():
    masks = next_masks({"a": torch.tensor([[1.0, 1e-5], [1.0, 0.0]])}, {}, {"a": []}, "structured", "global", 0.5)
    assert masks["a.weight"].tolist() == [[True, True], [False, False]]


def test_ties_go_by_position_in_a_layer_that_is_large_enough_for_another_sort():
    masks = next_masks({"a": torch.ones(100, 100)}, {}, {"a": []}, "unstructured", "global", 0.37)
    assert masks["a.weight"].flatten().tolist() == [False] * 3700 + [True] * 6300


# ---------------------------------------------------------------------------------------------------------------------
# Which layers.


def resnet20():
    torch.manual_seed(0)
    model = create_model("resnet20", 10)
    return model, trace(model, 8)


def test_the_first_convolution_and_the_last_linear_layer_stay_dense_unless_asked_for():
    _, graph = resnet20()
    names = list(graph.layers)
    assert prunable_layers(graph) == [name for name in names if name not in ("conv1", "fc")]
    assert prunable_layers(graph, []) == names
    assert prunable_layers(graph, ["layer1.0.conv1"]) == [name for name in names if name != "layer1.0.conv1"]
    with pytest.raises(UserError, match=r"prune.excepts: layer1.0.con1 is not a layer .* did you mean 'layer1.0.conv1'"):
        prunable_layers(graph, ["layer1.0.con1"])
    with pytest.raises(UserError, match="leaves no layer to prune"):
        prunable_layers(graph, names)


def test_classifiers_stay_dense_whatever_they_are():
    graph = trace(create_model("squeezenet1_0", 10), 64)
    assert set(graph.layers) - set(prunable_layers(graph)) == {"features.0", "classifier.1"}


def test_with_a_channel_go_its_bias_and_its_batchnorm():
    model, graph = resnet20()
    assert coupled_parameters(model, graph, "layer1.0.conv1") == ["layer1.0.bn1.weight", "layer1.0.bn1.bias"]
    assert coupled_parameters(model, graph, "fc") == ["fc.bias"]


class Between(nn.Module):
    """A function between a layer and its BatchNorm; another pair that nothing stands between."""

    def __init__(self, layer, function, batchnorm):
        super().__init__()
        self.stem, self.plain, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.layer, self.function, self.after = layer, function, batchnorm
        self.fc = nn.LazyLinear(2)
        self(torch.zeros(2, 3, 4, 4))

    def forward(self, x):
        x = self.norm(self.plain(self.stem(x)))
        x = x if isinstance(self.layer, nn.Conv2d) else x.mean((2, 3))
        x = self.after(self.function(self.layer(x)))
        return self.fc(x.flatten(1) if x.dim() < 4 else x.mean((2, 3)))


def swap(x):
    x[:, [0, 5]] = x[:, [5, 0]]
    return x


@pytest.mark.parametrize(("layer", "function", "batchnorm", "is_mixed"), [
    (nn.Conv2d(4, 6, 1), nn.Identity(), nn.BatchNorm2d(6), False),
    (nn.Conv2d(4, 6, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(6), False),
    (nn.Conv2d(4, 6, 1), lambda x: nn.functional.pad(nn.functional.silu(x), (1, 1, 1, 1)), nn.BatchNorm2d(6), False),
    (nn.Conv2d(4, 6, 1), nn.MaxPool2d(2), nn.BatchNorm2d(6), False),
    (nn.Conv2d(4, 6, 1), nn.GLU(1), nn.BatchNorm2d(3), True),
    (nn.Conv2d(4, 8, 1), nn.PixelShuffle(2), nn.BatchNorm2d(2), True),
    (nn.Conv2d(4, 6, 1), nn.ChannelShuffle(2), nn.BatchNorm2d(6), True),
    (nn.Conv2d(4, 6, 1), swap, nn.BatchNorm2d(6), True),
    (nn.Conv2d(4, 6, 1), lambda x: torch.cat([x, x], 1), nn.BatchNorm2d(12), True),
    (nn.Conv2d(4, 6, 1), lambda x: x.chunk(2, 1)[1], nn.BatchNorm2d(3), True),
    (nn.Conv2d(4, 6, 1), lambda x: x + x.mean(1, keepdim=True), nn.BatchNorm2d(6), True),
    (nn.Conv2d(4, 2, 1), lambda x: x.flip(1), nn.BatchNorm2d(2), True),
    (nn.Conv2d(4, 2, 1), lambda x: x + nn.functional.pad(x[:, :1], (0, 0, 0, 0, 1, 0)), nn.BatchNorm2d(2), True),
    (nn.Conv2d(4, 2, 1), lambda x: x + nn.functional.pad(x[:, 1:], (0, 0, 0, 0, 0, 1)), nn.BatchNorm2d(2), True),
    (nn.Conv2d(4, 6, 1), nn.Flatten(), nn.BatchNorm1d(96), True),
    (nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), False),
    (nn.Linear(4, 6), lambda x: x.roll(1, 1), nn.BatchNorm1d(6), True)])
def test_channels_are_pruned_only_where_they_are_those_of_the_batchnorm(layer, function, batchnorm, is_mixed):
    torch.manual_seed(0)
    model = Between(layer, function, batchnorm).eval()
    graph, before = trace(model, 4), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert graph.batchnorms == {"norm": "plain", "after": "layer"}
    prune = types.SimpleNamespace(type="structured", scope="layer", excepts=None)
    prunable = Prunable(types.SimpleNamespace(model=model, graph=graph), prune)
    assert prunable.layers == (["plain"] if is_mixed else ["plain", "layer"])
    assert ("layer (before after)" in prunable.remark) == is_mixed
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    PrunedParameters(model, prunable.more_masks({}, 0.5, None)).apply()
    assert model(torch.randn(2, 3, 4, 4)).isfinite().all()
    prune.type = "unstructured"
    assert Prunable(types.SimpleNamespace(model=model, graph=graph), prune).layers == ["plain", "layer"]


@pytest.mark.parametrize("mode", [True, False])
def test_a_pruned_channel_is_exactly_zero_behind_its_batchnorm(mode):
    model, graph = resnet20()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 0.5, 1)
            nn.init.uniform_(module.running_mean, 0.5, 1)
    weights = {name: model.get_submodule(name).weight.detach() for name in prunable_layers(graph)}
    coupled = {name: coupled_parameters(model, graph, name) for name in weights}
    masks = next_masks(weights, {}, coupled, "structured", "layer", 0.4)
    PrunedParameters(model, masks).apply()
    outputs = {}
    for batchnorm in graph.batchnorms:
        model.get_submodule(batchnorm).register_forward_hook(
            lambda module, inputs, output, name=batchnorm: outputs.update({name: output}))
    model.train(mode)(torch.randn(4, 3, 8, 8))
    paired = {batchnorm: before for batchnorm, before in graph.batchnorms.items() if before in weights}
    assert len(paired) == len(weights)
    for batchnorm, before in paired.items():
        kept = masks[f"{before}.weight"].flatten(1).any(1)
        assert 0 < kept.sum() < len(kept)
        assert (outputs[batchnorm][:, ~kept] == 0).all()
        assert (outputs[batchnorm][:, kept].flatten(2).abs().amax((0, 2)) > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Holding them.


@pytest.mark.parametrize("optimizer_of", [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)])
def test_removed_weights_stay_at_zero_whatever_the_optimizer_remembers(optimizer_of):
    layer = nn.Linear(4, 3)
    optimizer, removed = optimizer_of(layer.parameters()), torch.arange(12).view(3, 4) % 2 == 0

    def step():
        layer(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()

    step()  # the optimizer has a momentum before anything is removed
    pruned = PrunedParameters(layer, {})
    pruned.hold(optimizer)
    step()
    assert (layer.weight != 0).all()
    pruned.set({"weight": ~removed, "bias": torch.tensor([True, False, True])})
    for _ in range(3):
        step()
        assert torch.equal(layer.weight == 0, removed) and (layer.bias == 0).tolist() == [False, True, False]


def test_holding_applies_the_masks_at_once():
    layer = nn.Linear(4, 3)
    PrunedParameters(layer, {"weight": torch.zeros(3, 4, dtype=torch.bool)}).hold(torch.optim.SGD(layer.parameters(), lr=1))
    assert not layer.weight.any()


def test_the_mask_of_a_batchnorm_holds_in_every_copy():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0], model[1] = SwitchableBatchNorm(model[0], [4, 2, 8]), ExceptedBatchNorm(model[1])
    mask = torch.tensor([True, False, True])
    PrunedParameters(model, {"0.weight": mask, "1.weight": mask}).apply()
    for batchnorm in (*model[0].bns, model[1].bn):
        assert batchnorm.weight.tolist() == [1, 0, 1]


@pytest.mark.parametrize(("masks", "message"), [
    ({"layer1.0.con1.weight": torch.ones(1, dtype=torch.bool)}, "is not part of this network; did you mean"),
    ({3: torch.ones(1, dtype=torch.bool)}, "masks: 3 is not part of this network"),
    ({None: None}, "masks: None is not part of this network"),
    ({("a", 1): None}, "is not part of this network"),
    ({"fc.bias": torch.ones(10)}, "masks: fc.bias is not a mask"),
    ({"fc.bias": torch.ones(10, dtype=torch.uint8)}, "masks: fc.bias is not a mask"),
    ({"fc.bias": [True] * 10}, "masks: fc.bias is not a mask"),
    ({"fc.bias": None}, "masks: fc.bias is not a mask"),
    ({"fc.bias": torch.ones(10, dtype=torch.bool, device="meta")}, "masks: fc.bias is not a mask"),
    ({"fc.bias": torch.ones(10, dtype=torch.bool).to_sparse()}, "masks: fc.bias is not a mask"),
    ({"fc.bias": torch.ones(9, dtype=torch.bool)}, r"masks: fc.bias has shape \[9\], this network's is \[10\]"),
    ({"fc.bias": torch.ones(0, dtype=torch.bool)}, r"masks: fc.bias has shape \[0\]"),
    ({"fc.bias": torch.tensor(True)}, r"masks: fc.bias has shape \[\]"),
    ({"bn1.running_mean": torch.ones(16, dtype=torch.bool)}, "bn1.running_mean is not part of this network")])
def test_what_is_no_mask_of_this_network_is_named(masks, message):
    with pytest.raises(UserError, match=f"file: .*{message}"):
        checked_masks(create_model("resnet20", 10), masks, "file")


# ---------------------------------------------------------------------------------------------------------------------
# Step sizes of what remains.


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("init", ["lsq", "three_sigma"])
def test_initial_steps_come_from_the_weights_that_remain(init, per_channel):
    torch.manual_seed(0)
    weight, mask = torch.randn(4, 3, 2, 2).double() + 0.3, torch.rand(4, 3, 2, 2) < 0.6
    mask[2] = False
    mask[3] = False
    mask[3, 0, 0, 0] = True  # a single weight has no deviation
    quantizer = LsqQuan([8, 3], signed=True, channels=4 if per_channel else None, init=init).double()
    quantizer.init_from_weight(weight, mask)
    for index, bit in enumerate((8, 3)):
        wanted = []
        for kept in ([weight[channel][mask[channel]] for channel in range(4)] if per_channel else [weight[mask]]):
            values = kept.tolist()
            if not values:
                wanted.append(1e-5)
            elif init == "lsq":
                wanted.append(2 * sum(map(abs, values)) / len(values) / math.sqrt(2 ** (bit - 1) - 1))
            else:
                mean = sum(values) / len(values)
                deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))
                wanted.append(max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 2 ** (bit - 1))
        assert quantizer.s[index].flatten().tolist() == pytest.approx(wanted, rel=1e-9)
    assert quantizer.init_state.tolist() == [1, 1]


@pytest.mark.parametrize("init", ["lsq", "three_sigma"])
def test_a_mask_that_keeps_all_changes_no_step(init):
    torch.manual_seed(0)
    weight, steps = torch.randn(5, 7), []
    for kept in (None, torch.ones(5, 7, dtype=torch.bool)):
        quantizer = LsqQuan([4], signed=True, channels=5, init=init)
        quantizer.init_from_weight(weight, kept)
        steps.append(quantizer.s.detach())
    torch.testing.assert_close(*steps)


def test_the_indicator_of_a_layer_is_the_mean_over_channels_that_remain():
    mask = torch.ones(4, 3, 1, 1, dtype=torch.bool)
    mask[1], mask[2, :2] = False, False
    steps = torch.tensor([[1.0, 1e-5, 3.0, 5.0], [2.0, 1e-5, 6.0, 10.0]])
    state = {"a.quan_w_fn.s": steps, "a.quan_a_fn.s": torch.ones(2), "b.quan_w_fn.s": steps,
             "b.quan_a_fn.s": torch.ones(2)}
    content = indicators.extract({"state_dict": state, "bits": [4, 2], "masks": {"a.weight": mask}}, "c")
    assert content["weight"]["a"] == {4: 3.0, 2: 6.0}
    assert content["weight"]["b"] == {4: pytest.approx(9.00001 / 4), 2: pytest.approx(18.00001 / 4)}
    whole = {"a.weight": torch.zeros_like(mask)}  # nothing remains: all are alike
    content = indicators.extract({"state_dict": state, "bits": [4, 2], "masks": whole}, "c")
    assert content["weight"]["a"] == content["weight"]["b"]
    for wrong in (torch.ones(3, 1, dtype=torch.bool), torch.ones(4), 5, torch.tensor(True),
                  torch.ones(4, 1, dtype=torch.bool, device="meta")):
        with pytest.raises(UserError, match="c: masks: a.weight"):
            indicators.extract({"state_dict": state, "bits": [4, 2], "masks": {"a.weight": wrong}}, "c")


# ---------------------------------------------------------------------------------------------------------------------
# Costs.


class Tiny(nn.Module):
    """Two convolutions, one of them grouped and strided, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 2, stride=2, groups=2)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.second(self.first(x)).mean((2, 3)))


def multiplications(module, mask, entering):
    """Multiplications of a layer by a weight that is not pruned, counted one by one; padding counts as an input."""
    if isinstance(module, nn.Linear):
        return sum(mask.flatten().tolist())
    out_size = [(entering + 2 * module.padding[axis] - module.kernel_size[axis]) // module.stride[axis] + 1 for axis in (0, 1)]
    count = 0
    for channel, _, _ in itertools.product(range(module.out_channels), range(out_size[0]), range(out_size[1])):
        for kept in mask[channel].flatten().tolist():
            count += kept
    return count


def test_costs_of_a_pruned_network_are_those_counted_by_hand():
    torch.manual_seed(0)
    model = Tiny()
    graph = trace(model, 7)  # the second convolution leaves out a row and a column
    masks = {f"{name}.weight": torch.rand(model.get_submodule(name).weight.shape) < share
             for name, share in (("first", 0.25), ("second", 0.75))}
    left = weights_left(graph.layers, masks)
    assert left == {"first": int(masks["first.weight"].sum()), "second": int(masks["second.weight"].sum()), "fc": 12}
    macs = {name: multiplications(model.get_submodule(name), masks.get(f"{name}.weight", torch.ones(2, 6)), 7)
            for name in graph.layers}
    for name, call in graph.layers.items():
        assert nonzero_macs(call, left[name], call.macs_exact) == macs[name]
    weight_bits, act_bits = {"first": 3, "second": 2}, {"first": 5, "second": 4}
    cost = policy_cost(graph.layers, weight_bits, act_bits, left)
    total = 108 + 48 + 12
    assert cost["sparsity"] == pytest.approx(1 - sum(left.values()) / total)
    assert cost["gbitops_effective_exact"] == pytest.approx((macs["first"] * 15 + macs["second"] * 8 + 12 * 64) / 1e9)
    assert cost["gbitops_effective"] == pytest.approx(
        (49 * left["first"] * 15 + 12 * left["second"] * 8 + 12 * 64) / 1e9)  # 12.25 positions, rounded down
    bits = (108 + 3 * left["first"]) + 48 * 2 + 12 * 8  # sparse; dense, since the mask costs more than it saves; dense
    assert 108 + 3 * left["first"] < 108 * 3 and 48 + 2 * left["second"] > 48 * 2
    assert cost["sparse_size_mb"] == pytest.approx(bits / 8 / 2**20)
    assert cost["sparse_ratio"] == pytest.approx(total * 32 / bits)
    dense = policy_cost(graph.layers, weight_bits, act_bits)
    assert {key: cost[key] for key in dense} == dense and "sparsity" not in dense
    assert full_precision_cost(graph.layers, left)["gbitops_effective_exact"] == pytest.approx(
        sum(macs.values()) * 1024 / 1e9)


def test_a_layer_is_stored_dense_where_that_is_smaller():
    assert sparse_size(1000, 300, 4) == 1000 + 1200
    assert sparse_size(1000, 750, 4) == 1000 * 4 and sparse_size(1000, 751, 4) == 1000 * 4
    assert sparse_size(1000, 0, 8) == 1000 and sparse_size(1000, 1000, 1) == 1000
