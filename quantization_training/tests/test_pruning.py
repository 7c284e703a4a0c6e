"""Pruned networks in fine-tuning: masks that hold, what they are worth, and gradual pruning on its schedule."""

import copy
import pathlib

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_bad_input import complaint

import gradual
import main
import sparsity.ranking as ranking
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.run_folder import RunFolder
from gradual import sparsity_at
from model import create_model
from model.layer_table import trace
from quan.config import ExceptionConfig, QuanConfig, QuantizerConfig
from quan.utils import joint_modules, replace_module_by_names, step_quantizers
from sparsity.masks import PrunedParameters
from sparsity.ranking import coupled_parameters, next_masks, prunable_layers

pytestmark = pytest.mark.usefixtures("shallow")
CONFIG = """
name: run
output_dir: out
arch: resnet20
dataloader: {dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.1}
wandb: {mode: disabled}
quan: {act: {all_positive: true}, excepts: {conv1: , bn1: , fc: }}
weight_bits: 3
act_bits: 4
epochs: 2
lr: 0.05
weight_decay: 0.1
momentum: 0.9
calibration_images: 64
"""
TOTAL = 73728  # weights of the network but for its first convolution and its last layer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def finetune(*changes, name="run"):
    main.main(["config.yaml", f"name={name}", *changes])
    return load_checkpoint(f"out/{name}/{name}_checkpoint.pth.tar")


def summary(name="run"):
    return yaml.safe_load(pathlib.Path(f"out/{name}/summary.yaml").read_text())


def pruned_network(kind="unstructured", share=0.4, excepts=None):
    """A full-precision network under masks, its graph, and the masks."""
    torch.manual_seed(0)
    model = create_model("resnet20", 10)
    graph = trace(model, 8)
    weights = {name: model.get_submodule(name).weight.detach() for name in prunable_layers(graph, excepts)}
    coupled = {name: coupled_parameters(model, graph, name) for name in weights}
    masks = next_masks(weights, {}, coupled, kind, "global", share)
    PrunedParameters(model, masks).apply()
    return model, graph, masks


def dense_checkpoint(path, kind="unstructured", share=0.4, excepts=None):
    model, _, masks = pruned_network(kind, share, excepts)
    save_checkpoint(path, {"arch": "resnet20", "state_dict": model.state_dict(), "masks": masks})
    return masks


def joint_checkpoint(path, kind="unstructured", share=0.4):
    """A checkpoint of stage 1 under masks."""
    model, graph, masks = pruned_network(kind, share)
    excepts = {name: ExceptionConfig() for name in ("conv1", "bn1", "fc")}
    config = QuanConfig(act=QuantizerConfig(all_positive=True), excepts=excepts)
    replace_module_by_names(model, joint_modules(model, graph, config, [4, 3]))
    for quantizer in step_quantizers(model).values():
        quantizer.init_state.fill_(1)
    layers = {name: {"signed": {"weight": True, "act": False}} for name in graph.layers if name not in excepts}
    save_checkpoint(path, {"arch": "resnet20", "bits": [4, 3], "batchnorms": dict(graph.batchnorms), "layers": layers,
                           "state_dict": model.state_dict(), "masks": masks})
    return masks


def removed(masks, kind="unstructured"):
    """How many weights, or channels, of convolutions and linear layers are removed."""
    weights = [mask for mask in masks.values() if mask.dim() > 1]
    return sum(int((~(mask.flatten(1).any(1) if kind == "structured" else mask)).sum()) for mask in weights)


def quantized_weights(checkpoint):
    """{layer: quantized weight}."""
    state, found = checkpoint["state_dict"], {}
    for name in state:
        if name.endswith(".quan_w_fn.s"):
            layer = name.removesuffix(".quan_w_fn.s")
            bit = checkpoint["weight_bits"].get(layer, 8)
            scaled = (state[f"{layer}.weight"] / state[name]).clamp(-(2 ** (bit - 1)), 2 ** (bit - 1) - 1)
            found[layer] = scaled.round() * state[name]
    return found


def same(one, other):
    """Whether two nested containers hold equal values, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return one == other


# ---------------------------------------------------------------------------------------------------------------------
# Masks that come with the start.


@pytest.mark.parametrize("kind", ["unstructured", "structured"])
@pytest.mark.parametrize("change", ["opt=sgd", "opt=adamw"])
@pytest.mark.parametrize("source", ["init_from", "pre_trained"])
def test_what_is_removed_stays_zero_through_fine_tuning(folder, kind, change, source):
    masks = (joint_checkpoint if source == "init_from" else dense_checkpoint)("start", kind)
    tuned = finetune(f"{source}=start", change)
    assert same(tuned["masks"], masks)
    for name, mask in masks.items():
        weight = tuned["state_dict"][name]
        assert not weight[~mask].any()
        assert weight[mask].any() or not mask.any()
    quantized = quantized_weights(tuned)
    assert len(quantized) == 8
    for layer, weight in quantized.items():
        if f"{layer}.weight" in masks:
            assert not weight[~masks[f"{layer}.weight"]].any()
    if kind == "structured":
        assert removed(masks, kind) == 90 and any(mask.dim() == 1 for mask in masks.values())  # 0.4 of 224 channels


def test_a_network_in_full_precision_keeps_its_masks_too(folder):
    masks = dense_checkpoint("start")
    tuned = finetune("pre_trained=start", "fp_model=true", "weight_bits=", "act_bits=")
    assert all(torch.equal(tuned["state_dict"][name] != 0, mask) for name, mask in masks.items())
    assert summary()["sparse_ratio"] > 1 == summary()["ratio"]


def test_the_steps_of_layers_that_stage_1_left_alone_start_from_what_remains(folder, monkeypatch):
    masks = joint_checkpoint("start")
    content = load_checkpoint("start")
    masks["fc.weight"] = torch.rand(10, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    content["masks"] = masks
    content["state_dict"]["fc.weight"] = torch.randn(10, 64)  # under the mask too
    save_checkpoint("start", content)
    begun = {}
    monkeypatch.setattr(main.process, "finetune", lambda network, *arguments: begun.update(
        copy.deepcopy(network.model.state_dict())))
    monkeypatch.setattr(main.process, "final_evaluation", lambda *arguments: None)
    main.main(["config.yaml", "init_from=start"])
    left = content["state_dict"]["fc.weight"][masks["fc.weight"]]
    assert begun["fc.quan_w_fn.s"].item() == pytest.approx(2 * left.abs().mean().item() / 127**0.5, rel=1e-5)
    name = "layer2.0.conv1"
    assert torch.equal(begun[f"{name}.quan_w_fn.s"], content["state_dict"][f"{name}.quan_w_fn.s"][1:])  # 3 bits
    main.main(["config.yaml", "pre_trained=start", "name=other"]) if dense_checkpoint("start") else None
    dense = load_checkpoint("start")
    left = dense["state_dict"][f"{name}.weight"][dense["masks"][f"{name}.weight"]]
    assert begun[f"{name}.quan_w_fn.s"].item() == pytest.approx(2 * left.abs().mean().item() / 3**0.5, rel=1e-5)


def test_the_summary_counts_what_is_left(folder, capsys):
    dense_checkpoint("start", share=0.8)
    tuned, found = finetune("pre_trained=start", "epochs=1"), summary()
    graph = trace(create_model("resnet20", 10), 8)
    left = {name: int((tuned["state_dict"][f"{name}.weight"] != 0).sum()) for name in graph.layers}
    bits = {name: (3, 4) if name not in ("conv1", "fc") else (8, 8) for name in graph.layers}
    whole = sum(call.params for call in graph.layers.values())
    size = sum(min(call.params * bits[name][0], call.params + left[name] * bits[name][0])
               for name, call in graph.layers.items())
    assert found["sparsity"] == pytest.approx(1 - sum(left.values()) / whole)
    assert found["sparse_size_mb"] == pytest.approx(size / 8 / 2**20) and found["sparse_size_mb"] < found["size_mb"]
    assert found["sparse_ratio"] == pytest.approx(whole * 32 / size)
    assert found["gbitops_effective_exact"] == pytest.approx(sum(
        call.macs_exact * left[name] / call.params * bits[name][0] * bits[name][1]
        for name, call in graph.layers.items()) / 1e9)
    said = capsys.readouterr().out
    assert f"{100 * found['sparsity']:.2f} % sparse" in said and f"({found['sparse_ratio']:.2f}x total compression)" in said
    main.main(["config.yaml", "eval=true"])
    assert f"{100 * found['sparsity']:.2f} % sparse" in capsys.readouterr().out
    finetune("epochs=1", name="dense")
    assert "sparsity" not in summary("dense")


# ---------------------------------------------------------------------------------------------------------------------
# Gradual pruning.


@given(st.integers(0, 40), st.floats(0.1, 40), st.floats(0, 0.5), st.floats(0.5, 0.99), st.floats(-10, 100))
def test_the_sparsity_due_is_the_paper_s(start, length, initial, final, time):
    found = sparsity_at(time, start, start + length, initial, final)
    assert initial - 1e-12 <= found <= final + 1e-12
    passed = min(max(time, start), start + length)
    expected = final + (initial - final) * (1 - (passed - start) / length) ** 3
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_target_itself_is_due_from_the_end_on():
    assert sparsity_at(3, 1, 3, 0.1, 0.7) == sparsity_at(9, 1, 3, 0.1, 0.7) == 0.7
    assert sparsity_at(1, 1, 3, 0.1, 0.7) == sparsity_at(0, 1, 3, 0.1, 0.7) == 0.1


@pytest.fixture
def watched(monkeypatch):
    """Masks after each step of a run: [(epoch, share of it that is done, masks)]; what they remove is zero at once."""
    seen, after_step = [], gradual.GradualPruning.after_step

    def noted(self, epoch, step, steps):
        after_step(self, epoch, step, steps)
        for name, mask in self.pruned.masks.items():
            assert not self.model.get_parameter(name)[~mask].any()
        seen.append((epoch, (step + 1) / steps, dict(self.pruned.masks)))

    monkeypatch.setattr(gradual.GradualPruning, "after_step", noted)
    return seen


@pytest.mark.parametrize("kind", ["unstructured", "structured"])
def test_sparsity_follows_the_schedule_and_meets_its_target_to_the_weight(folder, watched, kind):
    tuned = finetune("prune.target_sparsity=0.63", f"prune.type={kind}", "prune.frequency=1", "epochs=3",
                     "prune.start_epoch=0.5", "prune.end_epoch=2")
    total = 224 if kind == "structured" else TOTAL
    assert len(watched) == 3 * 4
    before = {}
    for epoch, share, masks in watched:
        time = epoch + share
        due = 0 if time <= 0.5 else 0.63 * (1 - (1 - (min(time, 2) - 0.5) / 1.5) ** 3)
        assert abs(removed(masks, kind) - due * total) <= 0.5 + 1e-6, time
        assert all(not (masks[name] & ~mask).any() for name, mask in before.items())
        before = masks
    assert removed(tuned["masks"], kind) == round(0.63 * total) == removed(before, kind)
    assert same(tuned["masks"], before)
    for name, mask in tuned["masks"].items():
        assert not tuned["state_dict"][name][~mask].any()
    assert tuned["initial_sparsity"] == 0
    assert summary()["sparsity"] > 0.5


def test_masks_change_every_frequency_steps_at_ends_of_epochs_and_at_the_end(folder, watched):
    finetune("prune.target_sparsity=0.5", "prune.frequency=3", "epochs=3", "prune.end_epoch=2.5", "prune.scope=layer")
    counts = [removed(masks) for _, _, masks in watched]
    changed = [step + 1 for step in range(len(counts)) if counts[step] != (counts[step - 1] if step else 0)]
    assert changed == [3, 4, 6, 8, 9, 10]


def test_what_goes_is_smallest_when_it_goes(folder, monkeypatch):
    chosen, choose = [], ranking.next_masks

    def noted(weights, masks, *arguments):
        found = choose(weights, masks, *arguments)
        chosen.append(({name: weight.clone() for name, weight in weights.items()}, masks, found))
        return found

    monkeypatch.setattr(ranking, "next_masks", noted)
    finetune("prune.target_sparsity=0.5", "epochs=2")
    assert chosen
    for weights, masks, found in chosen:
        sizes = torch.cat([weight.flatten().abs() for weight in weights.values()])
        kept = torch.cat([found[f"{name}.weight"].flatten() for name in weights])
        gone = ~kept & torch.cat([masks.get(f"{name}.weight", torch.ones_like(found[f"{name}.weight"])).flatten()
                                  for name in weights])
        assert sizes[gone].max() <= sizes[kept].min()
        assert sizes[gone].max() > 0


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_run_stopped_on_its_schedule_ends_as_an_undisturbed_one(folder, monkeypatch, scope):
    dense_checkpoint("start", share=0.2)
    changes = ["pre_trained=start", "prune.target_sparsity=0.7321", "prune.frequency=2", "prune.end_epoch=2.5", "epochs=4",
               f"prune.scope={scope}"]
    undisturbed = finetune(*changes)
    save = RunFolder.save

    def save_and_stop(folder, checkpoint, *more):
        save(folder, checkpoint, *more)
        raise InterruptedError

    monkeypatch.setattr(RunFolder, "save", save_and_stop)
    for _ in range(4):
        with pytest.raises(InterruptedError):
            finetune(*changes, name="stopped")
    monkeypatch.setattr(RunFolder, "save", save)
    stopped = finetune(*changes, name="stopped")
    for key in undisturbed.keys() - {"config"}:
        assert same(undisturbed[key], stopped[key]), key
    assert undisturbed["initial_sparsity"] == pytest.approx(0.2, abs=1e-5)
    assert {**summary(), "name": ""} == {**summary("stopped"), "name": ""}


def test_no_epoch_is_best_before_the_target_is_reached(folder, monkeypatch):
    scores = iter([(90.0, 99.0), (80.0, 98.0), (50.0, 90.0), (40.0, 90.0)])
    monkeypatch.setattr(main.process, "validate", lambda *arguments: next(scores))
    tuned = finetune("prune.target_sparsity=0.5", "prune.end_epoch=2.5", "epochs=4")
    best = load_checkpoint("out/run/run_best.pth.tar")
    assert best["epoch"] == 3 and best["extras"] == {"top1": 50.0, "top5": 90.0} == tuned["extras"]
    assert removed(best["masks"]) == TOTAL // 2


def test_it_starts_from_the_sparsity_of_the_masks_it_was_given(folder, watched):
    masks = joint_checkpoint("start", share=0.4)
    tuned = finetune("init_from=start", "prune.target_sparsity=0.6", "prune.frequency=1", "prune.end_epoch=1")
    assert removed(masks) == 29491 and tuned["initial_sparsity"] == pytest.approx(29491 / TOTAL)
    for epoch, share, found in watched:
        due = 0.6 - (0.6 - 29491 / TOTAL) * (1 - min(epoch + share, 1)) ** 3
        assert abs(removed(found) - due * TOTAL) <= 0.5 + 1e-6
        assert all(not (found[name] & ~mask).any() for name, mask in masks.items())


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong.


@pytest.mark.parametrize(("changes", "message"), [
    (["prune.start_epoch=1", "prune.end_epoch=1"], "prune.start_epoch: found 1, allowed is less than end_epoch (1)"),
    (["prune.start_epoch=1.5"], "prune.start_epoch: found 1.5, allowed is less than end_epoch (1.5)"),
    (["prune.start_epoch=-1"], "prune.start_epoch"),
    (["prune.start_epoch=.nan"], "prune.start_epoch"),
    (["prune.end_epoch=2.1"], "prune.end_epoch: found 2.1, allowed is at most the 2 epochs of the run"),
    (["prune.end_epoch=0"], "prune.end_epoch"),
    (["prune.end_epoch=.nan"], "prune.end_epoch"),
    (["prune.end_epoch=.inf"], "prune.end_epoch"),
    (["prune.target_sparsity=1"], "prune.target_sparsity"),
    (["prune.target_sparsity=.nan"], "prune.target_sparsity"),
    (["prune.target_sparsity=[0.5]"], "prune.target_sparsity"),
    (["prune.frequency=0"], "prune.frequency"),
    (["prune.excepts=[fcc]"], "prune.excepts: fcc is not a layer of this network; did you mean 'fc'?"),
    (["prune.levels=3"], "prune.levels: unknown key"),
    (["freeze_weights=true"], "freeze_weights"),
])
def test_a_schedule_that_cannot_be_followed(folder, capsys, changes, message):
    assert message in complaint(capsys, "prune.target_sparsity=0.5", *changes)


def test_a_target_below_what_is_removed_already(folder, capsys):
    dense_checkpoint("start", share=0.4)
    said = complaint(capsys, "pre_trained=start", "prune.target_sparsity=0.3")
    assert "prune.target_sparsity: found 0.3, but 40.00 % of the weights are removed already" in said


@pytest.mark.parametrize(("scope", "target", "message"), [
    ("global", 0.98, "found 0.98, but one channel of each layer stays; 218 of 224 channels of all layers can go (0.9732)"),
    ("layer", 0.97, "found 0.97, but one channel of each layer stays; 15 of 16 channels of layer1.0.conv1 can go (0.9375)")])
def test_a_target_that_needs_the_last_channel_of_a_layer(folder, capsys, scope, target, message):
    words = ["prune.type=structured", f"prune.scope={scope}", "fp_model=true", "weight_bits=", "act_bits=", "epochs=1"]
    assert message in complaint(capsys, f"prune.target_sparsity={target}", *words)
    main.main(["config.yaml", "prune.target_sparsity=0.9375", *words])


@pytest.mark.parametrize(("masks", "message"), [
    ({"layer1.0.con1.weight": torch.ones(16, 16, 3, 3, dtype=torch.bool)}, "did you mean 'layer1.0.conv1.weight'"),
    ({"layer1.0.conv1.weight": torch.ones(16, 16, 1, 1, dtype=torch.bool)}, "has shape [16, 16, 1, 1]"),
    ({"layer1.0.conv1.weight": torch.ones(0, dtype=torch.bool)}, "has shape [0]"),
    ({"layer1.0.conv1.weight": torch.ones(16, 16, 3, 3)}, "is not a mask"),
    ({"layer1.0.conv1.quan_w_fn.s": torch.ones(1, dtype=torch.bool)}, "is not part of this network"),
    ({5: None}, "5 is not part of this network"), (7, "masks: found 7")])
def test_masks_of_another_network(folder, capsys, masks, message):
    save_checkpoint("start", {"arch": "resnet20", "state_dict": create_model("resnet20", 10).state_dict(), "masks": masks})
    for source in ("pre_trained", "init_from", "resume.path"):
        said = complaint(capsys, f"{source}=start")
        assert "masks" in said and message in said
        assert said.startswith((f"error: {source}: start: masks", "error: resume.path: masks"))
    assert message in complaint(capsys, "resume.path=start", "eval=true")
