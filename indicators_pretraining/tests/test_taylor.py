"""What the gradients of joint training say of each tensor, against formulas written down anew in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_joint_training import BITS, batch, jointly_quantized
from test_resume import SMALL
from torch import nn

import importance_extractor
import main
import process
from engine.checkpoint import load_checkpoint, save_checkpoint
from quan.quantizer import kernel
from quan.quantizer.lsq import gradients, lsq
from taylor import SQUARES, STEPS, SUM, TaylorSums, describe_factors, joint_fisher, loss_shares
from util.errors import UserError
from util.exchange import read_indicators


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@settings(max_examples=60, deadline=None)
@given(shape=st.sampled_from([(1,), (7,), (3, 4, 5, 5), (2, 20_000)]), channels=st.booleans(), seed=st.integers(0, 2**31),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), needs_v=st.booleans())
def test_the_change_is_the_gradient_times_the_error_of_quantization(kernels, shape, channels, seed, dtype, needs_v):
    kernel.use(kernels)
    try:
        generator = torch.Generator().manual_seed(seed)
        v, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        steps = torch.rand((shape[0], *[1] * (len(shape) - 1)) if channels else (), generator=generator) + 0.05
        steps, changes = steps.double() if dtype == torch.float64 else steps, []
        gradients(grad.clone(), v, steps, 4, 3, 1.0, needs_v, True, changes)
        errors = (v.double() / steps.double()).clamp(-4, 3).round() * steps.double() - v.double()
        wanted = (grad.double() * errors).sum()
        tolerance = (1e-12 if dtype == torch.float64 else 1e-5) * (grad.double() * errors).abs().sum() + 1e-12
        near_edges = dtype != torch.float64  # float32 may round a value to the other integer, whose errors are half a step
        tolerance += 1e-5 * v.double().abs().sum() if near_edges else 0
        assert len(changes) == 1 and changes[0].dtype == torch.float64 and abs(changes[0] - wanted) <= tolerance
    finally:
        kernel.use("auto")


def taken_apart(model, switch, images, target, bit):
    """{(kind, layer): sum of the gradient of its quantized tensor times the error} in plain autograd, and the loss."""
    switch.uniform(bit)
    quantized, handles = {}, []

    def watch(kind, name):
        def see(_, inputs, out):
            out.retain_grad()
            quantized[kind, name] = inputs[0].detach(), out
        return see

    for name, layer in switch.layers.items():
        layer.is_fused = False
        for kind, quantizer in (("weight", layer.quan_w_fn), ("act", layer.quan_a_fn)):
            handles.append(quantizer.register_forward_hook(watch(kind, name)))
    loss = F.cross_entropy(model(images), target)
    loss.backward()
    for handle in handles:
        handle.remove()
    for layer in switch.layers.values():
        layer.is_fused = True
    model.zero_grad()
    return {key: (out.grad * (out - v)).sum().item() for key, (v, out) in quantized.items()}, loss.item()


def test_sums_of_joint_steps_are_those_of_plain_autograd():
    model, switch = jointly_quantized(batchnorm=False)
    images, target = batch()
    process.joint_gradients(model, switch, images, target, nn.CrossEntropyLoss(), None)  # steps take their values
    taylor, chosen = TaylorSums(switch), dict.fromkeys(switch.layers, 4)
    parts = [(images[:5], target[:5]), (images[5:], target[5:])]
    for part in parts:
        process.joint_gradients(model, switch, *part, nn.CrossEntropyLoss(), chosen, taylor=taylor)
    for index, bit in enumerate(BITS):
        found = [taken_apart(model, switch, *part, bit) for part in parts]
        rows = [*[(kind, name) for kind in ("weight", "act") for name in switch.layers], None]
        for row, key in zip(taylor.sums[:, index], rows, strict=True):
            values = [changes[key] if key else loss for changes, loss in found]
            wanted = [2, sum(values), sum(value**2 for value in values)]
            assert row.tolist() == pytest.approx(wanted, rel=1e-9), (bit, key)
    assert taylor.images == 3 and all(quantizer.changes is None for quantizer in taylor.quantizers)
    taylor.start_epoch()
    assert not taylor.sums.any()


def test_a_layer_that_is_used_twice_has_one_change():
    """Two quantized copies of one value: the loss changes by what both change together."""
    v = torch.tensor([0.3, 1.4], dtype=torch.float64, requires_grad=True)
    changes, step = [], torch.tensor(0.5, dtype=torch.float64)
    (3 * lsq(v, step, 4, 3, changes=changes) + lsq(v, step, 4, 3, changes=changes)).sum().backward()
    assert float(sum(changes)) == pytest.approx(4 * ((0.5 - 0.3) + (1.5 - 1.4)))


def checkpoint_of(values, losses, images=8):
    """A checkpoint whose steps had these T, [step][2 * layers][bits], and these losses, [step][bits]."""
    values = torch.cat([torch.as_tensor(values), torch.as_tensor(losses)[:, None]], 1).double()
    sums = torch.stack([torch.full_like(values[0], len(values)), values.sum(0), values.square().sum(0)], -1)
    return {"taylor": {"images": images, "sums": [sums]}, "bits": [6, 2], "layers": {"a": {}, "b": {}}}


@given(seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_shares_of_a_quadratic_loss_add_up_to_the_gap_and_are_half_of_the_changes(seed):
    """L = x.H.x / 2 at its minimum x = 0 plus D: T of each tensor is D_i (H D)_i, and k comes out as 1/2."""
    generator = torch.Generator().manual_seed(seed)
    half, errors = (torch.rand(shape, dtype=torch.float64, generator=generator) for shape in ((4, 4), 4))
    hessian = half @ half.T  # all of it positive, so that every tensor adds to the loss
    point = errors.clone().requires_grad_()
    loss = point @ hessian @ point / 2
    changes = torch.autograd.grad(loss, point)[0] * errors
    losses = torch.tensor([[0.0, loss.item()]], dtype=torch.float64)
    checkpoint = checkpoint_of(torch.stack([torch.zeros(4).double(), changes], 1)[None], losses)
    tables, factors = loss_shares(checkpoint, "c.pth")
    shares = [tables[kind][name][2] for kind in ("weight", "act") for name in "ab"]
    assert sum(shares) == pytest.approx(loss.item(), rel=1e-12)
    assert factors[2] == pytest.approx(0.5) and factors[6] == 0 and len(describe_factors(factors)) == 1
    assert shares == pytest.approx((errors * (hessian @ errors) / 2).tolist(), rel=1e-9)


def test_sums_go_on_with_another_number_of_processes():
    _, switch = jointly_quantized(batchnorm=False)
    parts = list(torch.rand(2, 5, len(BITS), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    for sums, wanted in ((parts, parts[0] + parts[1]), (parts[:1], parts[0]), ([], torch.zeros_like(parts[0]))):
        taylor = TaylorSums(switch)
        taylor.restore(SimpleNamespace(path="c.pth", content={"taylor": {"images": 7, "sums": sums}} if sums else {}))
        assert torch.equal(taylor.sums, wanted) and taylor.images == (7 if sums else 0)
    with pytest.raises(UserError, match="c.pth: taylor: holds sums of other layers"):
        taylor.restore(SimpleNamespace(path="c.pth", content={"taylor": {"images": 7, "sums": [parts[0][1:]]}}))


def test_changes_that_help_have_no_share_and_odd_factors_are_named():
    values = torch.tensor([[[0.0, -1.0], [0.0, 0.02], [0.0, 0.01], [0.0, 0.07]]])
    tables, factors = loss_shares(checkpoint_of(values, torch.tensor([[1.0, 1.3]])), "c.pth")
    assert tables["weight"]["a"][2] == 0 and factors[2] == pytest.approx(3)
    assert sum(row[2] for table in tables.values() for row in table.values()) == pytest.approx(0.3)
    assert "warning: k is far from 1/2 at 2 bits" in describe_factors(factors)[1]
    tables, factors = loss_shares(checkpoint_of(values, torch.tensor([[1.0, 0.9]])), "c.pth")  # fewer bits cost nothing
    assert factors[2] == 0.5 and tables["act"]["b"][2] == pytest.approx(0.035)


def test_shares_of_a_single_bit_width_are_refused():
    checkpoint = {**checkpoint_of(torch.ones(3, 4, 1), torch.ones(3, 1)), "bits": [4]}
    with pytest.raises(UserError, match=r"--of: loss_share compares bit-widths .*, but c.pth was trained at \[4\] alone"):
        loss_shares(checkpoint, "c.pth")
    assert joint_fisher(checkpoint, "c.pth")["weight"]["a"][4] == 0.5


def test_a_single_step_does_not_show_how_changes_vary():
    checkpoint = checkpoint_of(torch.ones(1, 4, 2), torch.tensor([[1.0, 2.0]]))
    with pytest.raises(UserError, match="c.pth: its sums of T are of one step"):
        joint_fisher(checkpoint, "c.pth")
    assert loss_shares(checkpoint, "c.pth")[0]["weight"]["a"][2] == 0.25


@given(seed=st.integers(0, 2**31), steps=st.integers(2, 9), images=st.integers(1, 64))
@settings(max_examples=30, deadline=None)
def test_joint_fisher_is_half_the_mean_square_of_the_product_of_one_image(seed, steps, images):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(steps, 4, 2, dtype=torch.float64, generator=generator)
    tables = joint_fisher(checkpoint_of(values, torch.ones(steps, 2), images), "c.pth")
    for index, (kind, name) in enumerate([("weight", "a"), ("weight", "b"), ("act", "a"), ("act", "b")]):
        for bit, column in ((6, 0), (2, 1)):
            found = values[:, index, column]
            assert tables[kind][name][bit] == pytest.approx((images * found.var().item() + found.mean().item() ** 2) / 2)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A jointly trained network of four layers in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(SMALL)
    (tmp_path / "config.yaml").write_text("""
arch: small.py:make
name: run
epochs: 2
lr: 0.05
target_bits: [4, 2]
quan: {excepts: auto, act: {all_positive: auto}}
dataloader: {dataset: digits, input_size: 16, batch_size: 32, data_fraction: 0.2}
wandb: {mode: disabled}
""")
    main.main(["config.yaml"])
    return "results/run/run_checkpoint.pth.tar"


def test_the_checkpoint_has_sums_of_the_last_epoch_which_the_extractor_reads(run, capsys):
    content = load_checkpoint(run)
    [sums] = content["taylor"]["sums"]
    assert content["taylor"]["images"] == 32 and sums.shape == (2 * len(content["layers"]) + 1, 2, 3)
    assert (sums[..., STEPS] == sums[0, 0, STEPS]).all() and sums[0, 0, STEPS] * 32 <= 0.2 * 1797
    assert (sums[..., SQUARES] * sums[..., STEPS] >= sums[..., SUM].square() * (1 - 1e-9)).all()
    found = {}
    for of in ("steps", "loss_share", "joint_fisher"):
        importance_extractor.main([run, "--output", f"{of}.pkl", "--of", of])
        found[of] = read_indicators(f"{of}.pkl")
        assert found[of]["kind"] == of
    assert "k, the part" in capsys.readouterr().out
    for key in found["steps"].keys() - {"weight", "act", "kind"}:
        assert all(content[key] == found["steps"][key] for content in found.values()), key
    assert found["joint_fisher"]["weight"] == joint_fisher(content, run)["weight"]
    assert found["loss_share"]["act"] == loss_shares(content, run)[0]["act"]
    means = sums[..., SUM] / sums[..., STEPS]
    gap = (means[-1, 1] - means[-1, 0]).item()
    shares = [row[2] for kind in ("weight", "act") for row in found["loss_share"][kind].values()]
    assert gap > 0 and math.isclose(sum(shares), gap)


def test_a_checkpoint_without_sums_is_refused_by_name(run, capsys):
    content = load_checkpoint(run)
    del content["taylor"]
    save_checkpoint("old.pth.tar", content)
    importance_extractor.main(["old.pth.tar", "--output", "steps.pkl"])
    with pytest.raises(UserError, match="old.pth.tar: holds no sums of T"):
        importance_extractor.main(["old.pth.tar", "--output", "i.pkl", "--of", "joint_fisher"])
    with pytest.raises(UserError, match="loss_share compares the candidates of one training"):
        importance_extractor.main([run, "old.pth.tar", "--output", "i.pkl", "--of", "loss_share"])
    content["taylor"] = {"images": 32, "sums": [torch.full((5, 2, 3), math.nan, dtype=torch.float64)]}
    content["taylor"]["sums"][0][..., STEPS] = 3
    save_checkpoint("nan.pth.tar", content)
    with pytest.raises(UserError, match="its indicators .weight. are not finite"):
        importance_extractor.main(["nan.pth.tar", "--output", "i.pkl", "--of", "joint_fisher"])
    del content["taylor"]
    main.main(["config.yaml", "epochs=1", "name=student", "in_place_distillation=true"])
    assert "taylor" not in load_checkpoint("results/student/student_checkpoint.pth.tar")
    save_checkpoint(run, content)
    main.main(["config.yaml", "epochs=3"])
    assert "taylor" in load_checkpoint(run)
