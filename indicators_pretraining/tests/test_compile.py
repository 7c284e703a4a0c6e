"""The whole network compiled: one function for all bit-widths, with the values and gradients of the one that is not."""

import functools

import pytest
import torch
from test_joint_training import BITS, EXCEPTS, SmallNet
from test_quantizer import SETTINGS, given, problems, st
from test_resume import SMALL
from torch import nn
from torch._dynamo.exc import TorchDynamoException

import main
import process
from engine.passes import Passes
from model.layer_table import trace
from quan.bit_switch import BitSwitch
from quan.config import QuanConfig, QuantizerConfig
from quan.quantizer import kernel, lsq
from quan.quantizer.lsq import traceable_lsq
from quan.utils import joint_modules, replace_module_by_names
from util.errors import UserError

CONFIG = """
arch: small.py:make
target_bits: [4, 2]
dataloader: {dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.1, val_split: 0.1}
wandb: {mode: disabled}
quan: {excepts: {'0': , '1': , '10': }}
compile: true
lr: 0.001
sched: constant
"""
needs_compiler = pytest.mark.skipif(not kernel.find_compiler(), reason="torch.compile needs a C++ compiler on the CPU")


@SETTINGS
@given(problems(), st.integers(0, 2**31))
def test_what_is_traced_equals_the_quantizer(problem, seed):
    v, s, qn, qp, scale = problem
    incoming = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours, theirs = [[v.clone().requires_grad_(), s.clone().requires_grad_()] for _ in range(2)]
    q, expected = traceable_lsq(*ours, torch.tensor(float(qn)), torch.tensor(float(qp)), scale), lsq(*theirs, qn, qp, scale)
    assert torch.equal(q, expected)
    q.backward(incoming)
    expected.backward(incoming)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-14, atol=0)
    terms = (incoming.abs() * (qn + qp + 1)).sum() * scale
    assert (ours[1].grad - theirs[1].grad).abs().max() <= 1e-9 * terms


def network(compiled):
    torch.manual_seed(0)
    model = SmallNet()
    graph = trace(model, 9)
    replace_module_by_names(model, joint_modules(model, graph, QuanConfig(act=QuantizerConfig(all_positive=True),
                                                                           excepts=EXCEPTS), BITS))
    switch = BitSwitch(model.train(), graph, EXCEPTS, BITS)
    if compiled:
        switch.keep_as_data(torch.device("cpu"))
    return model, switch, Passes(model, compiled=compiled)


@needs_compiler
def test_joint_steps_equal_those_without_and_are_compiled_once(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True))  # no part is left to Python
    generator = torch.Generator().manual_seed(1)
    runs = []
    policies = [{"first": 3, "second": 2}, {"first": 2, "second": 4}, {"first": 4, "second": 3}]
    batches = [(torch.randn(8, 3, 9, 9, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in policies]
    for compiled in (False, True):
        model, switch, passes = network(compiled)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for number, (batch, policy) in enumerate(zip(batches, policies, strict=True)):
            # The first step is not compiled, the second one is; the third meets other bit-widths.
            torch.compiler.set_stance("fail_on_recompile" if number == 2 else "default")
            try:
                process.joint_step(model, switch, *batch, nn.CrossEntropyLoss(), optimizer, policy, passes=passes)
            finally:
                torch.compiler.set_stance("default")
        runs.append(({name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())))
    (plain, buffers), (ours, our_buffers) = runs
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    for name, buffer in buffers.items():
        torch.testing.assert_close(our_buffers[name], buffer, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@needs_compiler
def test_an_error_of_the_compiler_is_one_line(monkeypatch):
    model, switch, passes = network(True)

    def fail(*_):
        raise TorchDynamoException("no such thing\nand more")

    passes._compiled, passes._starting = fail, False
    with pytest.raises(UserError, match=r"^compile: the network cannot be compiled \(no such thing\); give compile: false$"):
        passes.logits(torch.zeros(2, 3, 9, 9))


def test_a_compiled_run_can_be_continued_and_leaves_the_usual_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # The same way without the minutes that a compiler takes for a whole network.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "small.py").write_text(SMALL)
    states = {}
    for name, runs in {"at_once": [2], "continued": [1, 2]}.items():
        for epochs in runs:
            main.main(["config.yaml", f"name={name}", f"epochs={epochs}"])
        states[name] = torch.load(f"results/{name}/{name}_checkpoint.pth.tar", weights_only=True)["state_dict"]
    assert not any("_orig_mod" in name or name.endswith((".bit_index", ".ranges")) for name in states["at_once"])
    for name, tensor in states["at_once"].items():
        assert torch.equal(tensor, states["continued"][name]), name
    main.main(["config.yaml", "name=plain", "epochs=2", "compile=false"])
    plain = torch.load("results/plain/plain_checkpoint.pth.tar", weights_only=True)["state_dict"]
    for name in plain:
        if name.endswith(".s"):
            torch.testing.assert_close(states["at_once"][name], plain[name], rtol=0.02, atol=1e-3, msg=name)
