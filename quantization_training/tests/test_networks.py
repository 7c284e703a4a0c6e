"""Networks of the user's own and transformers, from stage 1 into fine-tuning."""

import pathlib

import pytest
import torch
from torch import nn

from engine.checkpoint import save_checkpoint
from model import create_model, list_architectures
from model.layer_table import trace
from network import build_network
from quan.config import ActQuantizerConfig, QuanConfig
from quan.utils import joint_modules, name_exceptions, replace_module_by_names, step_quantizers
from schema import FinetuneConfig
from util.config import load_config
from util.errors import UserError
from util.exchange import write_policy

CPU, BITS = torch.device("cpu"), [4, 3, 2]
SHARED = """
from torch import nn

class Shared(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleList([self.block, self.block, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))])
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))
"""


def joint_checkpoint(arch, size, path="joint"):
    """What stage 1 leaves of a network, every step size and BatchNorm of each candidate with a value of its own."""
    torch.manual_seed(0)
    model = create_model(arch, 10, input_size=size)
    graph = trace(model, size, 10)
    config, _ = name_exceptions(FinetuneConfig(arch=arch, fp_model=True), graph)
    quan = QuanConfig(act=ActQuantizerConfig(all_positive=False), excepts=config.quan.excepts)
    replace_module_by_names(model, joint_modules(model, graph, quan, BITS))
    for number, quantizer in enumerate(step_quantizers(model).values(), 1):
        nn.init.constant_(quantizer.s, number)
        quantizer.s.data += torch.tensor(BITS) / 10
        quantizer.init_state.fill_(1)
    for name, buffer in model.named_buffers():
        if ".bns." in name and name.endswith("running_mean"):
            buffer.fill_(BITS[int(name.split(".bns.")[1][0])])
    layers = {name: {"signed": {"weight": True, "act": True}} for name in graph.layers if name not in quan.excepts}
    save_checkpoint(path, {"arch": arch, "state_dict": model.state_dict(), "bits": BITS, "layers": layers,
                           "batchnorms": graph.batchnorms})
    return layers, step_quantizers(model)


def test_a_module_under_two_names_keeps_the_step_sizes_and_batchnorm_of_its_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "net.py").write_text(SHARED)
    layers, joint = joint_checkpoint("nets/net.py:Shared", 8)
    (tmp_path / "nets" / "net.py").rename("net.py")
    write_policy("policy.yaml", {"arch": "nets/net.py:Shared", "layer_name": list(layers), "weight_bits": [2, 4],
                                 "act_bits": [3, 2]})
    config = FinetuneConfig(arch="net.py:Shared", policy="policy.yaml", init_from="joint")
    model = build_network(config, 10, 8, None, CPU).model
    assert model.blocks[0] is model.blocks[1] is model.block
    for name, weight_bit, act_bit in (("block.0", 2, 3), ("blocks.2.0", 4, 2)):
        layer = model.get_submodule(name)
        assert layer.quan_w_fn.s.tolist() == [joint[f"{name}.quan_w_fn"].s[BITS.index(weight_bit)].item()]
        assert layer.quan_a_fn.s.tolist() == [joint[f"{name}.quan_a_fn"].s[BITS.index(act_bit)].item()]
        assert layer.quan_a_fn.signed
    assert model.block[1].running_mean.tolist() == [2] * 4 and model.blocks[2][1].running_mean.tolist() == [4] * 4


@pytest.mark.parametrize("arch", ["vit_tiny_patch4_32", "swin_t"])
def test_a_transformer_goes_from_all_candidates_to_the_bits_of_a_policy(arch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers, joint = joint_checkpoint(arch, 32)
    weight_bits = [BITS[index % 3] for index in range(len(layers))]
    config = FinetuneConfig(arch=arch, weight_bits=weight_bits, act_bits=3, init_from="joint")
    network = build_network(config, 10, 32, None, CPU)
    for name, bit in zip(layers, weight_bits, strict=True):
        layer = network.model.get_submodule(name)
        assert layer.quan_w_fn.s.item() == joint[f"{name}.quan_w_fn"].s[BITS.index(bit)].item()
        assert layer.quan_a_fn.s.item() == joint[f"{name}.quan_a_fn"].s[1].item()
    assert list(network.config.quan.excepts) == {"swin_t": ["features.0.0", "head"]}.get(arch, ["conv_proj", "heads.head"])
    assert "non-layer MACs" in network.remark and "exceptions found in the graph" in network.remark
    first, last = (network.model.get_submodule(name) for name in network.config.quan.excepts)
    assert first.quan_w_fn.bits == last.quan_w_fn.bits == last.quan_a_fn.bits == (8,)
    assert network.model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_another_file_or_factory_is_another_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(SHARED + "\nother = Shared\n")
    joint_checkpoint("net.py:Shared", 8)
    config = FinetuneConfig(arch="net.py:other", weight_bits=4, act_bits=4, init_from="joint")
    with pytest.raises(UserError, match="joint: holds net.py:Shared, but arch is net.py:other"):
        build_network(config, 10, 8, None, CPU)
    write_policy("policy.yaml", {"arch": "net.py:Shared", "layer_name": ["block.0"], "weight_bits": [2], "act_bits": [3]})
    config = FinetuneConfig(arch="net.py:other", policy="policy.yaml")
    with pytest.raises(UserError, match="the policy is for net.py:Shared, but arch is net.py:other"):
        build_network(config, 10, 8, None, CPU)


@pytest.mark.parametrize("path", sorted(pathlib.Path(__file__).parents[1].glob("*.yaml")), ids=lambda path: path.name)
def test_configuration_files_are_valid_and_name_a_network(path):
    config = load_config(FinetuneConfig, [str(path)])
    assert config.arch in list_architectures() or config.arch.startswith("timm:")
    assert config.eval or config.fp_model or config.policy or config.weight_bits
