"""Swaps keep the budgets and come in the order of their cost; a refined policy has less divergence, inside its budgets."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import complaint
from test_resume import SMALL

import importance_extractor
import main
import refine
from engine.checkpoint import load_checkpoint
from model.weights import load_state
from network import build_network
from quan.cost import policy_cost
from quan.func import KINDS
from schema import IndicatorsConfig
from swaps import Swaps, budgets_of, floors_of, held
from util.config import load_config
from util.data_loader import create_loaders
from util.errors import UserError
from util.exchange import read_indicators, read_policy, write_indicators, write_policy

BITS = [2, 3, 4, 6]


@st.composite
def problems(draw):
    """(layers, fixed, costs, choice, budgets as a policy file has them)."""
    names = [f"l{i}" for i in range(draw(st.integers(2, 5)))]
    number = st.integers(1, 50)
    rows = [{"params": draw(number), "macs_published": draw(number), "macs_exact": draw(number), "act_elements": draw(number)}
            for _ in range(len(names) + 1)]
    keys = [(kind, name) for kind in KINDS for name in names]
    falling = st.lists(st.integers(0, 30), min_size=4, max_size=4).map(lambda values: sorted(values, reverse=True))
    costs = {key: dict(zip(BITS, draw(falling), strict=True)) for key in keys}
    choice = {key: draw(st.sampled_from(BITS)) for key in keys}
    asked = {"bops": draw(st.booleans()), "wb": 3, "ab": 4, "cr": draw(st.sampled_from([0, 7.5, 10])),
             "macs": draw(st.sampled_from(["published", "exact"]))}
    for key, value in (("avg_wb", 3), ("avg_ab", 3.5), ("size_budget", 1e-4), ("bops_budget", 1e-6), ("act_mem", 5e-5)):
        if draw(st.booleans()):
            asked[key] = value
    return dict(zip(names, rows, strict=False)), {"fixed": rows[-1]}, costs, choice, asked


def amounts(layers, fixed, choice, asked):
    """{budget: (amount, limit)} as docs/search.md says them, written down anew."""
    macs = f"macs_{asked['macs']}"
    bits = {name: (choice["weight", name], choice["act", name]) for name in layers}
    bitops = sum(row[macs] * bits[name][0] * bits[name][1] for name, row in layers.items())
    size = sum(row["params"] * bits[name][0] for name, row in layers.items()) + 8 * fixed["fixed"]["params"]
    full = 32 * (sum(row["params"] for row in layers.values()) + fixed["fixed"]["params"])
    found = {"bops": (bitops, sum(row[macs] for row in layers.values()) * asked["wb"] * asked["ab"]),
             "bops_budget": (bitops + 64 * fixed["fixed"][macs], asked.get("bops_budget", 0) * 1e9),
             "cr": (size, full / (asked["cr"] or 1)), "size_budget": (size / 2**23, asked.get("size_budget", 0)),
             "avg_wb": (sum(w for w, _ in bits.values()) / len(bits), asked.get("avg_wb", 0)),
             "avg_ab": (sum(a for _, a in bits.values()) / len(bits), asked.get("avg_ab", 0))}
    return {key: pair for key, pair in found.items() if asked.get(key)}


@settings(max_examples=150, deadline=None)
@given(problems())
def test_swaps_keep_every_budget_and_come_in_the_order_of_their_cost(problem):
    layers, fixed, costs, choice, asked = problem
    budgets = budgets_of({"constraints": asked}, layers, fixed, choice, "p.yaml")
    before = amounts(layers, fixed, choice, asked)
    found = Swaps(layers, costs, budgets).find(choice)
    assert [cost for cost, _ in found] == sorted(cost for cost, _ in found)
    for cost, changes in found:
        changed = {**choice, **changes}
        assert cost == sum(costs[key][changed[key]] - costs[key][choice[key]] for key in choice)
        assert all(abs(BITS.index(changed[key]) - BITS.index(choice[key])) == 1 for key in changes)
        for key, (amount, limit) in amounts(layers, fixed, changed, asked).items():
            assert amount <= max(limit, before[key][0]) * (1 + 1e-12) + 1e-12, key
    assert len({tuple(sorted(changes)) + tuple(changes.values()) for _, changes in found}) == len(found)


@settings(max_examples=60, deadline=None)
@given(problems(), st.data())
def test_an_exchange_of_one_for_one_is_never_missed(problem, data):
    """Where only the mean bits of weights are limited, and exactly used, each cheapest exchange of two weights is found."""
    layers, fixed, costs, choice, _ = problem
    choice = {**choice, **{("weight", name): 3 for name in layers}}
    asked = {"bops": False, "cr": 0, "avg_wb": 3, "macs": "exact"}
    swaps = Swaps(layers, costs, budgets_of({"constraints": asked}, layers, fixed, choice, "p.yaml"))
    up = ("weight", data.draw(st.sampled_from(sorted(layers))))
    down = min((("weight", name) for name in layers if name != up[1]), key=lambda key: costs[key][2] - costs[key][3])
    cost = costs[up][4] - costs[up][3] + costs[down][2] - costs[down][3]
    assert any(changes.get(up) == 4 and len(changes) == 2 and found == cost for found, changes in swaps.find(choice))


def test_pins_and_ties_are_held_and_unknown_budgets_refused():
    row = {"params": 1, "macs_published": 1, "macs_exact": 1, "act_elements": 1}
    layers = dict.fromkeys(("a.x", "a.y", "b", "c"), row)
    policy = {"constraints": {"fix": {"a.*": [2, 2]}, "tie": [["b", "a.x"]]}}
    assert held(policy, layers) == {"a.x", "a.y", "b"} and held({}, layers) == set()
    choice = {(kind, name): 3 for kind in KINDS for name in layers}
    costs = dict.fromkeys(choice, {2: 3, 3: 2, 4: 1, 6: 0})
    budgets = budgets_of(policy, layers, {}, choice, "p.yaml")
    swaps = Swaps(layers, costs, budgets, held(policy, layers)).find(choice)
    assert swaps and all(name == "c" for _, changes in swaps for _, name in changes)
    depthwise = {**row, "groups": 4, "shape": [4, 1, 3, 3]}
    layers = {"a": {**row, "groups": 1, "shape": [4, 4, 3, 3]}, "b": depthwise, "c": depthwise}
    assert held({"constraints": {"fix": {"depthwise": [2, 2]}, "tie": [["module.a", "b"]]}}, layers) == {"a", "b", "c"}
    floors = floors_of({"constraints": {"at_least": {"depthwise": [3, 2], "c": [2, 4]}}}, layers)
    assert floors == {("weight", "b"): 3, ("act", "b"): 2, ("weight", "c"): 3, ("act", "c"): 4}
    choice = {(kind, name): 3 for kind in KINDS for name in layers}
    swaps = Swaps(layers, dict.fromkeys(choice, costs[next(iter(costs))]), budgets_of({}, layers, {}, choice, "p.yaml"), (),
                  floors).find(choice)
    assert swaps and all(changes.get(("weight", name)) != 2 for _, changes in swaps for name in "bc")
    for key in ("latency_budget", "same_bits", "sparse_bops"):
        with pytest.raises(UserError, match=f"p.yaml: was searched with {key}"):
            budgets_of({"constraints": {key: 3}}, layers, {}, choice, "p.yaml")


# ---------------------------------------------------------------------------------------------------------------------
# The command.


DEEP = SMALL.replace("nn.Conv2d(6, 6, 3), nn.ReLU()", "nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()")
CONFIG = """
arch: net.py:make
name: run
epochs: 4
opt: adamw
lr: 0.01
target_bits: [6, 4, 3, 2]
quan: {excepts: auto, act: {all_positive: auto}}
dataloader: {dataset: digits, input_size: 16, batch_size: 32}
wandb: {mode: disabled}
"""
TRAINED = "results/run/run_checkpoint.pth.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("refine")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        (path / "net.py").write_text(DEEP)
        (path / "config.yaml").write_text(CONFIG)
        main.main(["config.yaml"])
        importance_extractor.main([TRAINED, "--of", "joint_fisher", "--output", "i.pkl"])
    return path


@pytest.fixture(autouse=True)
def inside(request):
    if "folder" in request.fixturenames:
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("folder"))


def write_uniform(path, bit, **others):
    names = list(load_checkpoint(TRAINED)["layers"])
    write_policy(path, {"arch": "net.py:make", "layer_name": names, "weight_bits": [bit] * len(names),
                        "act_bits": [bit] * len(names), **others})
    return names


def divergence_of(path, images):
    """The KL divergence of a policy in a copy, its BatchNorms estimated in one batch."""
    config, policy = load_config(IndicatorsConfig, ["config.yaml"]), read_policy(path)
    network = build_network(config, 10, 16, None, torch.device("cpu"))
    load_state(network.model, load_checkpoint(TRAINED)["state_dict"], TRAINED)
    batches = list(create_loaders(config.dataloader, config.seed, 0, 1, torch.device("cpu")).calibration(images))
    images = torch.cat([images for images, _ in batches])
    model, switch = copy.deepcopy((network.model, network.switch))
    with torch.no_grad():
        switch.uniform(6)
        best = model.eval()(images).log_softmax(1)
        switch.policy(*(dict(zip(policy["layer_name"], policy[f"{kind}_bits"], strict=True)) for kind in KINDS))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train().momentum = None
                module.reset_running_stats()
        for batch, _ in batches:
            model(batch)
        return F.kl_div(model.eval()(images).log_softmax(1), best, reduction="batchmean", log_target=True).item()


def test_a_refined_policy_has_less_divergence_within_the_budgets(folder, capsys):
    names = write_uniform("uniform.yaml", 3, act_signed=[False] * 3)
    write_policy("uneven.yaml", {**read_policy("uniform.yaml"), "weight_bits": [2, 2, 6], "act_bits": [2, 6, 2],
                                 "candidates": [6, 3, 2]})
    words = ["config.yaml", "--policy", "uneven.yaml", "--images", "400", "--i", "i.pkl"]
    refine.main([*words, "--output", "refined.yaml"])
    printed, policy = capsys.readouterr().out, yaml.safe_load((folder / "refined.yaml").read_text())
    assert {*policy["weight_bits"], *policy["act_bits"]} <= {6, 3, 2}
    assert policy["refined"]["swaps"] >= 1 and printed.count("swap ") >= policy["refined"]["swaps"]
    assert policy["refined"]["kl"] < policy["refined"]["kl_before"] and policy["layer_name"] == names
    assert policy["refined"]["kl_before"] == pytest.approx(divergence_of("uneven.yaml", 400), rel=1e-3)
    assert policy["refined"]["kl"] == pytest.approx(divergence_of("refined.yaml", 400), rel=1e-3)
    rows = load_checkpoint(TRAINED)
    costs = []
    for path in ("uneven.yaml", "refined.yaml"):
        found = read_policy(path)
        calls = {name: Row(row) for name, row in {**rows["layers"], **rows["fixed"]}.items()}
        costs.append(policy_cost(calls, *(dict(zip(names, found[f"{kind}_bits"], strict=True)) for kind in KINDS)))
    assert costs[1]["gbitops"] <= costs[0]["gbitops"] and costs[1]["size_mb"] <= costs[0]["size_mb"]
    assert policy["cost"]["size_mb"] == pytest.approx(costs[1]["size_mb"]) and not policy["optimal"]
    assert policy["cost"]["bitops_published"] == pytest.approx(costs[1]["gbitops"] * 1e9)
    assert policy["cost"]["bitops_exact"] == pytest.approx(costs[1]["gbitops_exact"] * 1e9)
    refine.main([*words, "--output", "again.yaml"])
    assert (folder / "again.yaml").read_text() == (folder / "refined.yaml").read_text()


@pytest.mark.parametrize("alpha", [0.5, 3])
def test_swaps_weigh_weights_as_the_search_of_the_policy_did(folder, monkeypatch, alpha):
    seen = []
    monkeypatch.setattr(refine, "Swaps", lambda layers, costs, *limits: seen.append(costs) or Swaps(layers, costs, *limits))
    write_uniform("weighed.yaml", 3, alpha=alpha)
    words = ["--policy", "weighed.yaml", "--images", "32", "--tries", "1", "--i", "i.pkl", "--output", "o.yaml"]
    refine.main(["config.yaml", *words])
    indicators = read_indicators("i.pkl")
    for (kind, name), row in seen[0].items():
        assert row[2] == pytest.approx(max(indicators[kind][name].values()) * (alpha if kind == "weight" else 1))


class Row:
    """A row of the layer table, with the fields that costs are counted from."""

    def __init__(self, row):
        vars(self).update(row)


def test_policies_are_ranked_with_their_costs(folder, capsys):
    for bit in (2, 6, 4):
        write_uniform(f"u{bit}.yaml", bit)
    refine.main(["config.yaml", "--policy", "u2.yaml", "u6.yaml", "u4.yaml", "--images", "200"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [line[-1] for line in lines] == ["u6.yaml", "u4.yaml", "u2.yaml"]
    divergences = [float(line[0]) for line in lines]
    assert divergences == sorted(divergences) and divergences[2] == pytest.approx(divergence_of("u2.yaml", 200), abs=2e-4)


def test_policies_whose_outputs_are_not_finite_rank_last(capsys):
    row = {"params": 1, "macs_published": 1, "macs_exact": 1}
    judge = SimpleNamespace(divergences=lambda choice: torch.tensor([choice["divergence"]]), layers={"a": row}, fixed={})
    values = {"nan.yaml": math.nan, "b.yaml": 2.0, "other.yaml": math.nan, "c.yaml": 1.0}
    refine.rank(judge, {path: {("weight", "a"): 2, ("act", "a"): 2, "divergence": value} for path, value in values.items()})
    shown = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert shown == ["c.yaml", "b.yaml", "nan.yaml", "other.yaml"]


def test_a_gain_that_other_images_might_undo_is_none():
    least = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert refine.is_clearly_less(least - torch.tensor([0.1, 0.12, 0.1, 0.12]), least)
    assert not refine.is_clearly_less(least - torch.tensor([0.9, -0.3, -0.3, 0.1]), least)
    assert not refine.is_clearly_less(least, least)


@pytest.mark.parametrize(("words", "message"), [
    (["--policy", "u3.yaml", "--i", "i.pkl"], "--i, --output: go together"),
    (["--policy", "u3.yaml", "u3.yaml", "--i", "i.pkl", "--output", "o.yaml"], "--policy: found 2 policies"),
    (["--policy", "u3.yaml", "--i", "i.pkl", "--output", "o.yaml", "--images", "1"], "--images: found 1 image; a gain"),
    (["--policy", "u3.yaml", "--i", "none.pkl", "--output", "o.yaml", "dataloader.path=none"], "none.pkl: cannot read"),
    (["--policy", "u3.yaml", "--i", "resnet.pkl", "--output", "o.yaml"], "--i: resnet.pkl is of 'resnet18', but arch is"),
    (["--policy", "u3.yaml", "--i", "other.pkl", "--output", "o.yaml"], "; it is a file of another network"),
    (["--policy", "u3.yaml", "--tries", "3"], "--tries: belongs to --i and --output"),
    (["--policy", "u3.yaml", "--tries", "0"], "--tries: found 0"),
    (["--policy", "u3.yaml", "--i", "i.pkl", "--output", "config.yaml"], "--output: config.yaml is"),
    (["--policy", "u3.yaml", "--i", "i.pkl", "--output", "u3.yaml"], "--output: u3.yaml is"),
    (["--policy", "u3.yaml", "--i", "i.pkl", "--output", "net.py"], "--output: net.py ends in .py"),
    (["--policy", "u3.yaml", "--i", "i.pkl", "--output", "results/run/run_best.pth.tar"], "as checkpoints do; policies"),
    (["--policy", "u3.yaml", "--i", "i.pkl", "--output", "results"], "--output: results is a folder"),
    (["--policy", "u5.yaml"], "u5.yaml: weight_bits: 3 has 5 bits, but the network was trained at [2, 3, 4, 6]"),
    (["--policy", "other.yaml"], "is a layer of the policy or of the network, but not of both"),
    (["--policy", "resnet.yaml"], "resnet.yaml: the policy is for resnet18, but arch is net.py:make"),
    (["--policy", "none.yaml"], "none.yaml: cannot read"), (["--policy", "i.pkl"], "i.pkl"),
    (["name=nothing", "--policy", "u3.yaml"], "resume.path"),
    (["name=nothing", "arch=resnet20", "--policy", "u3.yaml", "--i", "i.pkl", "--output", "o.yaml"], "i.pkl is of")])
def test_what_cannot_be_refined_is_refused(folder, capsys, words, message):
    write_uniform("u3.yaml", 3)
    write_uniform("u5.yaml", 5)
    policy = read_policy("u3.yaml")
    write_policy("other.yaml", {**policy, "layer_name": [*policy["layer_name"][:-1], "conv9"]})
    write_policy("resnet.yaml", {**policy, "arch": "resnet18"})
    row = {"other": dict.fromkeys(BITS, 1.0)}
    write_indicators("other.pkl", {"layer_name": ["other"], "weight": row, "act": row})
    write_indicators("resnet.pkl", {"layer_name": ["other"], "weight": row, "act": row, "arch": "resnet18"})
    assert message in complaint(capsys, refine.main, "config.yaml", *words)


@pytest.mark.parametrize("edited", [
    {"bops": True}, {"bops": True, "wb": "3", "ab": 3}, {"bops": True, "wb": 3, "ab": 3, "macs": "x"}, 3, [1], {"fix": 3},
    {"tie": [3]}, {"cr": float("inf")}, {"cr": float("nan")}, {"at_least": {"*": 3}}, {"size_budget": "much"},
    {"tie": ["3", "6"]}, {"at_least": {"con1": [3, 3]}}, {"fix": {"con1": [3, 3]}}])
def test_a_section_of_constraints_that_was_edited_is_refused(folder, capsys, edited):
    write_uniform("edited.yaml", 3, constraints=edited)
    words = ["--policy", "edited.yaml", "--images", "32", "--i", "i.pkl", "--output", "o.yaml"]
    said = complaint(capsys, refine.main, "config.yaml", *words)
    assert "edited.yaml: candidates, alpha, constraints: not as the search writes them" in said


@pytest.mark.parametrize(("edited", "message"), [
    ({"candidates": 3}, "not as the search writes them"), ({"candidates": None}, "not as the search writes them"),
    ({"candidates": "6 3"}, "not as the search writes them"), ({"alpha": "auto"}, "not as the search writes them"),
    ({"alpha": float("nan")}, "(alpha is nan)"), ({"alpha": float("inf")}, "(alpha is inf)"), ({"alpha": -1}, "(alpha is -1"),
    ({"constraints": {"sparse_size": True}}, "error: edited.yaml: was searched with sparse_size, which swaps cannot keep")])
def test_other_keys_that_were_edited_and_budgets_that_swaps_cannot_keep_are_refused(folder, capsys, edited, message):
    write_uniform("edited.yaml", 3, **edited)
    words = ["--policy", "edited.yaml", "--images", "32", "--i", "i.pkl", "--output", "o.yaml"]
    assert message in complaint(capsys, refine.main, "config.yaml", *words)
