"""Where `arch:` may take a network from, and what may be wrong with it."""

import sys
import types

import pytest
import torch
from test_bad_input import CONFIG, complaint
from torch import nn

import importance_extractor
import main
from engine.checkpoint import load_checkpoint
from model import create_model
from util.errors import UserError
from util.exchange import read_indicators, same_arch, split_arch

SOURCE = """
from dataclasses import dataclass

from torch import nn
from blocks_of_mine import block

@dataclass
class Options:
    width: int = 4

class Net(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, width, 3), block(width), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))

def make(num_classes):
    return Net(num_classes, Options().width)

def wants_more(num_classes, depth):
    return Net(num_classes)

def wants_another(classes):
    return Net(classes)

def gives_none(num_classes):
    pass

def fails(num_classes):
    missing = {}
    return missing["key"]

def leaves(num_classes):
    raise SystemExit("usage: ...")

def ignores(num_classes):
    return Net(77)

NUMBER = 5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "stage").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "net.py").write_text(SOURCE)
    (tmp_path / "mine" / "blocks_of_mine.py").write_text("from torch import nn\n\ndef block(width):\n"
                                                         "    return nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU())\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.modules.pop("blocks_of_mine", None)
    monkeypatch.chdir(tmp_path / "stage")
    with open("config.yaml", "w") as file:
        file.write(CONFIG.replace(", excepts: {conv1: , bn1: , fc: }", ""))
    return tmp_path


def test_a_factory_in_a_file_is_called_with_the_number_of_classes(folder):
    for arch in ("../mine/net.py:make", "../mine/net.py:Net", f"{folder}/mine/net.py:make"):
        assert create_model(arch, 7)(torch.zeros(2, 3, 8, 8)).shape == (2, 7)


def test_a_path_may_begin_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert create_model("~/mine/net.py:make", 7).fc.out_features == 7


@pytest.mark.parametrize(("arch", "message"), [
    ("resnt18", "arch: 'resnt18' is not a known network; did you mean 'resnet18'?"),
    ("zzzz", "arch: 'zzzz' is not a known network; expected a name such as resnet18, timm:NAME, or path/to/file.py:factory"),
    ("../mine/net.py", "arch: '../mine/net.py' is a file; say what in it builds the network, ../mine/net.py:factory"),
    ("mine/net.py:make", "arch: mine/net.py: cannot read the file (No such file or directory); paths are relative to"),
    ("../mine:make", "arch: '../mine:make' is not a known network"),
    ("../mine/net.py:mke", "arch: ../mine/net.py has no 'mke'; did you mean 'make'?"),
    ("'../mine/net.py:'", "arch: ../mine/net.py has no ''"),
    ("../mine/net.py:NUMBER", "arch: ../mine/net.py has no function 'NUMBER'"),
    ("../mine/net.py:wants_more", "takes (num_classes, depth), but is called with num_classes=...; give it a parameter"),
    ("../mine/net.py:wants_another", "takes (classes), but is called with num_classes=..."),
    ("../mine/net.py:gives_none", "arch: ../mine/net.py:gives_none gave a NoneType, expected an nn.Module"),
    ("../mine/net.py:fails", "arch: ../mine/net.py:fails failed in line 33 (KeyError: 'key')"),
    ("../mine/net.py:leaves", "arch: ../mine/net.py:leaves failed in line 36 (SystemExit: usage: ...)"),
    ("../mine/net.py:ignores", "arch: the network has 77 outputs, the data have 10 classes"),
    ("../mine/broken.py:make", "arch: ../mine/broken.py:make failed in line 2 (SyntaxError: "),
    ("../mine/needs.py:make", "arch: ../mine/needs.py:make failed in line 1 (ModuleNotFoundError: No module named"),
    ("timm:resnet18", "arch: 'timm:resnet18' needs timm, which is not installed"),
    ("vit_tiny_patch16_224", "the network does not take images of 8x8 (Input shape indivisible by patch size!); change arch"),
    ("vit_b_16", "the network does not take images of 8x8"),
    ("convnext_tiny", "the network does not take images of 8x8"),
])
def test_what_may_be_wrong_is_one_line(folder, capsys, monkeypatch, arch, message):
    monkeypatch.setitem(sys.modules, "timm", None)
    (folder / "mine" / "broken.py").write_text("import os\ndef make(:\n")
    (folder / "mine" / "needs.py").write_text("import no_such_module_anywhere\n")
    assert message in complaint(capsys, main.main, "config.yaml", f"arch={arch}")


@pytest.mark.parametrize("arch", ["../mine/net.py:make", "resnet20"])
def test_there_are_weights_of_torchvisions_networks_only(folder, arch):
    with pytest.raises(UserError, match="pre_trained: torchvision has no weights of"):
        create_model(arch, 10, pre_trained=True)


def test_files_later_on_never_run_the_code_they_name(folder, capsys):
    main.main(["config.yaml", "arch=../mine/net.py:make"])
    said = capsys.readouterr().out
    assert "exceptions found in the graph: stem (first layer), fc (classifier)" in said
    canary = folder / "canary"
    (folder / "mine" / "net.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    path = "out/run/run_checkpoint.pth.tar"
    assert load_checkpoint(path)["arch"] == "../mine/net.py:make"
    importance_extractor.main([path, "--output", "out/i.pkl"])
    assert read_indicators("out/i.pkl")["arch"] == "../mine/net.py:make" and not canary.exists()
    assert "holds ../mine/net.py:make, but arch is resnet20" in complaint(capsys, main.main, "config.yaml", "name=other",
                                                                        f"resume.path={path}", "resume.lean=true")
    assert not canary.exists()


def test_a_run_goes_on_where_its_file_was_moved_and_its_exceptions_are_written_out(folder, capsys):
    main.main(["config.yaml", "arch=../mine/net.py:make"])
    (folder / "mine").rename(folder / "stage" / "nets")
    sys.modules.pop("blocks_of_mine", None)
    capsys.readouterr()
    words = ["config.yaml", "arch=nets/net.py:make", "epochs=2"]
    main.main([*words, "quan.excepts.stem.weight.bit=", "quan.excepts.fc.weight.bit="])
    assert "continuing after epoch 1" in capsys.readouterr().out
    main.main([*words, "eval=true"])
    assert "at 2 bits: loss" in capsys.readouterr().out
    said = complaint(capsys, main.main, *words, "quan.excepts.stem.weight.bit=")
    assert "the run was started with another quan.excepts.fc" in said
    said = complaint(capsys, main.main, *words, "eval=true", "quan.excepts=none")
    assert "was trained with another quan.excepts" in said


def test_one_network_under_two_paths():
    assert split_arch("a/net.py:make") == ("a/net.py", "make") and split_arch("C:\\a\\net.py:f") == ("C:\\a\\net.py", "f")
    assert split_arch("timm:resnet18") is None and split_arch("resnet18") is None and split_arch("net.py") is None
    assert same_arch("a/net.py:make", "/b/net.py:make") and same_arch("a\\net.py:make", "net.py:make")
    assert not same_arch("net.py:make", "net.py:other") and not same_arch("net.py:make", "model.py:make")
    assert same_arch("resnet18", "resnet18") and not same_arch("resnet18", "net.py:resnet18") and not same_arch("a", 5)


# ---------------------------------------------------------------------------------------------------------------------
# timm


class FakeTimm(types.ModuleType):
    """timm as far as it is asked, for where it is not installed."""

    __version__ = "1"

    def __init__(self):
        super().__init__("timm")
        self.calls = []

    def is_model(self, name):
        return name in self.list_models()

    def list_models(self):
        return ["resnet18", "vit_tiny"]

    def get_pretrained_cfg(self, name):
        return types.SimpleNamespace(fixed_input_size=name == "vit_tiny", input_size=(3, 224, 224))

    def create_model(self, name, pretrained, num_classes, **options):
        self.calls.append((name, pretrained, num_classes, options))
        if pretrained:
            raise RuntimeError("no route\nto host")
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def test_networks_of_timm_by_name(monkeypatch):
    fake = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", fake)
    create_model("timm:resnet18", 10, input_size=32)
    create_model("timm:vit_tiny", 10, input_size=32)
    create_model("timm:vit_tiny", 10, input_size=224)
    assert fake.calls == [("resnet18", False, 10, {}), ("vit_tiny", False, 10, {"img_size": 32}),
                          ("vit_tiny", False, 10, {})]
    with pytest.raises(UserError, match="'resnet81' is not a network of timm 1; did you mean 'resnet18'"):
        create_model("timm:resnet81", 10)
    with pytest.raises(UserError, match=r"^pre_trained: timm cannot build resnet18 \(no route\)$"):
        create_model("timm:resnet18", 10, pre_trained=True)


@pytest.mark.parametrize(("name", "layers"), [("vit_tiny_patch16_224", 50), ("mobilenetv2_100", 53)])
def test_real_networks_of_timm(name, layers):
    pytest.importorskip("timm")
    from test_graph import counted

    from model.layer_table import trace

    model = create_model(f"timm:{name}", 10, input_size=64)
    graph = trace(model, 64, 10)
    assert len(graph.layers) == layers
    macs = sum(call.macs_exact for call in graph.layers.values()) + sum(graph.non_layer_macs.values())
    assert macs == counted(model, 64)[0]


def test_what_is_not_the_size_is_not_blamed_on_it(monkeypatch):
    def broken(arch, num_classes, input_size):
        raise AssertionError("no such activation")

    monkeypatch.setattr("model.model._own_model", broken)
    with pytest.raises(UserError, match=r"^arch: resnet20 cannot be built \(AssertionError: no such activation\)$"):
        create_model("resnet20", 10, input_size=8)
