"""Whether activations are signed: decided from the first training batch of all ranks, kept in every file, never again."""

import pickle
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as multiprocessing
import yaml

import importance_extractor
import main
from quan.quantizer import LsqQuan, integer_range
from util import distributed
from util.errors import UserError

pytestmark = pytest.mark.xdist_group("signs")  # one process makes what all read
CONFIG = """
arch: mobilenet_v2
target_bits: [6, 4]
dataloader: {dataset: digits, input_size: 32, batch_size: 8, data_fraction: 0.02, val_split: 0.05}
wandb: {mode: disabled}
epochs: 1
lr: 0.001
final_test: false
"""
BOTTLENECK = """
from torch import nn


def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


@pytest.mark.parametrize("lowest, signed", [(0.0, False), (-1e-3, True)])
def test_the_first_training_batch_decides(lowest, signed):
    quantizer = LsqQuan([4, 2], signed=None, symmetric=True)
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    x[0, 0] = lowest
    quantizer.eval()(-x)
    assert quantizer.signed is None and quantizer.quantization_range == (0, 15) and not quantizer.is_initialized
    quantizer.train().select(2)
    quantizer(x)
    assert quantizer.signed is signed and quantizer.quantization_range == integer_range(2, signed, symmetric=True)
    quantizer(-x - 1)
    quantizer(x.abs())
    assert quantizer.signed is signed


def one_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
                                         timeout=timedelta(minutes=2))
    quantizers = [LsqQuan([4], signed=None).train() for _ in range(3)]
    quantizers[0](torch.tensor([1.0, -1.0]) if rank else torch.tensor([1.0, 2.0]))
    quantizers[1](torch.tensor([1.0, 2.0]))
    quantizers[2](torch.zeros(2))
    before = quantizers[2].signed
    quantizers[2](torch.tensor([1.0, -1.0]) if rank else torch.zeros(2))  # zero on one rank only
    torch.save([before, *((quantizer.signed, quantizer.s.item()) for quantizer in quantizers)], f"{folder}/{rank}.pt")
    distributed.leave_process_group()


def test_a_negative_value_on_any_rank_makes_it_signed_on_all_and_zeros_are_those_of_all_ranks(tmp_path):
    other = multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=1, join=False)  # rank 0; this process is the other one
    one_rank(1, str(tmp_path))
    while not other.join():
        pass
    wanted = [(True, 2 * 1.25 / 7**0.5), (False, 2 * 1.5 / 15**0.5), (True, 2 * 0.5 / 7**0.5)]
    for rank in range(2):
        before, *found = torch.load(tmp_path / f"{rank}.pt")
        assert before is None and found == [(signed, pytest.approx(step)) for signed, step in wanted]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signs")
    (folder / "config.yaml").write_text(CONFIG)
    main.main([str(folder / "config.yaml"), f"output_dir={folder}", "name=run"])
    return folder


def test_linear_bottlenecks_are_signed_in_checkpoint_and_indicators(trained):
    path = trained / "run" / "run_checkpoint.pth.tar"
    content = torch.load(path, weights_only=True)
    signs = content["signed"]
    # The input of an expansion is the output of a linear bottleneck; the others see what a ReLU6 leaves.
    expansions = {name for name in signs if name.endswith("conv.0.0") and name != "features.1.conv.0.0"}
    assert {name for name, signed in signs.items() if signed} == expansions | {"features.18.0"}
    importance_extractor.main([str(path), "--output", str(trained / "indicators.pkl")])
    with open(trained / "indicators.pkl", "rb") as file:
        layers = pickle.load(file)["layers"]
    assert {name: row["signed"]["act"] for name, row in layers.items()} == signs


def test_a_continued_run_takes_them_from_its_checkpoint(trained, monkeypatch):
    before = torch.load(trained / "run" / "run_checkpoint.pth.tar", weights_only=True)["signed"]
    observe = LsqQuan.observe

    def observe_decided(self, x):
        assert self.signed is not None
        observe(self, x)

    monkeypatch.setattr(LsqQuan, "observe", observe_decided)
    main.main([str(trained / "config.yaml"), f"output_dir={trained}", "name=run", "epochs=2"])
    assert torch.load(trained / "run" / "run_checkpoint.pth.tar", weights_only=True)["signed"] == before


def test_forcing_it_afterwards_is_refused(trained):
    with pytest.raises(UserError, match="another quan.act.all_positive"):
        main.main([str(trained / "config.yaml"), f"output_dir={trained}", "name=run", "epochs=3",
                   "quan.act.all_positive=true"])


def test_true_and_false_force_it(tmp_path):
    (tmp_path / "net.py").write_text(BOTTLENECK)
    words = [f"arch={tmp_path}/net.py:make", "dataloader.input_size=8", f"output_dir={tmp_path}"]
    for forced, wanted in (("auto", [True, False]), (True, [False, False]), (False, [True, True])):
        (tmp_path / "config.yaml").write_text(CONFIG + yaml.safe_dump({"quan": {"act": {"all_positive": forced}}}))
        main.main([str(tmp_path / "config.yaml"), *words, f"name=run_{forced}"])
        content = torch.load(tmp_path / f"run_{forced}" / f"run_{forced}_checkpoint.pth.tar", weights_only=True)
        assert content["signed"] == dict(zip(["2", "4"], wanted, strict=True))


