"""The benchmark of packed networks and the latency table, with clocks of their own: no test measures time."""

import csv
import importlib.util
import itertools
import pathlib

import pytest
import torch
from test_export import FILE, OWN, PACKED, complaint, write_checkpoint
from test_integer import ODD
from test_onnx import needs_onnxruntime
from torch import nn

import benchmark
import export
from engine.checkpoint import save_checkpoint
from packed_network import load_any


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "ROUNDS", 3)
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: None)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, *milliseconds):
        """A function that takes so long, call by call."""
        times = iter(milliseconds)

        def function(_):
            self.now += next(times) / 1e3

        return function


def test_medians_and_ratios_are_of_calls_in_turn_after_one_that_does_not_count():
    clock = Clock()
    ways = {"float32": clock.takes(900, 10, 30, 20), "integer": clock.takes(800, 5, 50, 4)}
    rows = benchmark.measure(ways, torch.zeros(4, 1), rounds=3, clock=clock)
    assert [(row["way"], row["batch"], round(row["ms"], 6), round(row["ratio"], 6)) for row in rows] == [
        ("float32", 4, 20, 1), ("integer", 4, 5, 4)]


def test_the_demo_says_how_many_times_faster_the_packed_model_is(monkeypatch):
    write_checkpoint("mobilenet_v2_tiny", 32)
    export.main([FILE, "--output", PACKED])
    monkeypatch.setattr(benchmark, "measure", lambda ways, images: [
        {"way": way, "ratio": len(images) + index} for index, way in enumerate(ways)])
    assert benchmark.speed(PACKED, 3) == 4


@pytest.mark.usefixtures("shallow")
def test_a_line_for_each_way_and_batch(capsys, monkeypatch):
    write_checkpoint("resnet20", 16)
    export.main([FILE, "--output", PACKED])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    capsys.readouterr()
    export.main(["--benchmark", PACKED, "--batch", "1", "3", "--threads", "1"])
    said = capsys.readouterr().out.splitlines()
    title, *remarks, head = said[:-8]
    assert "resnet20, images of 16 pixels, 1 thread, medians of 3" in title
    assert head.split() == ["way", "batch", "ms", "ratio"]
    assert remarks == ["packed, integer: integer arithmetic in 6 of 8 layers; in float: conv1 (its input is not quantized); "
                       "fc (8 by 8 bits: two products may exceed 16 bits)",
                       "onnxruntime: not measured; pip install -r requirements-export.txt"]
    rows = [line.rsplit(maxsplit=3) for line in said[-8:]]
    assert [row[:2] for row in rows] == [[way, batch] for batch in "13" for way in (
        "float32", "float32, BatchNorm folded", "packed, float", "packed, integer")]
    for *_, ms, ratio in rows:
        assert float(ms) > 0 and float(ratio) > 0
    assert {row[3] for row in rows if row[0] == "float32"} == {"1.00"}


@pytest.mark.usefixtures("shallow")
@needs_onnxruntime
def test_what_onnxruntime_does_not_compute_is_said_and_the_rest_is_timed(monkeypatch):
    import onnx_integer

    network = write_checkpoint("resnet20", 16)
    graphs = onnx_integer.to_integer_onnx(network.model, torch.zeros(1, 3, 16, 16))
    graphs[0].graph.node[-1].op_type = "NoSuchOperator"
    monkeypatch.setattr(onnx_integer, "to_integer_onnx", lambda *_: graphs)
    ways, [remark] = benchmark.in_onnxruntime(network, benchmark.unquantized(network))
    assert list(ways) == ["onnxruntime, float32", "onnxruntime, qdq"]
    assert remark.startswith("onnxruntime, integer: not measured; the installed onnxruntime does not compute this network (")


def test_the_rivals_are_the_network_without_quantizers_as_it_is_and_folded():
    network = write_checkpoint("mobilenet_v2_tiny", 32)
    dense = benchmark.unquantized(network)
    assert {name: tensor.shape for name, tensor in dense.state_dict().items()} == {
        name: tensor.shape for name, tensor in network.model.state_dict().items() if "quan_" not in name}
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    folded = benchmark.folded(network, dense)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    x = benchmark.images_for(network, 2)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(folded(x), dense(x), rtol=1e-3, atol=1e-4)


def test_the_times_of_layers_are_the_sums_of_their_calls_in_one_pass():
    clock = Clock()
    slow, fast = nn.Identity(), nn.Identity()
    slow.forward, fast.forward = (lambda x, ms=ms: (clock.takes(ms)(x), x)[1] for ms in (5, 1))
    network = nn.Sequential(slow, fast, slow)
    network.register_forward_hook(lambda *_: clock.takes(2)(None))
    times, whole = benchmark.layer_times(network, ["0", "1"], None, rounds=2, clock=clock)
    assert {name: round(ms, 6) for name, ms in times.items()} == {"0": 10, "1": 1} and round(whole, 6) == 13


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_latency_table_has_every_layer_at_every_pair_and_adds_up_to_the_network(is_packed, capsys, monkeypatch):
    pathlib.Path("net.py").write_text(ODD)
    network = write_checkpoint("net.py:net", 13)
    path = PACKED if is_packed else "stage_1.pth.tar"
    if is_packed:
        export.main([FILE, "--output", PACKED, "--arch", "net.py:net"])
    else:
        content = load_any(FILE)
        save_checkpoint(path, {key: content[key] for key in content if key not in ("weight_bits", "act_bits", "scaled")}
                        | {"bits": [4, 2]})
    names, searched = list(network.graph.layers), list(network.metadata["weight_bits"])
    taken = iter([({name: 2.0**index for index, name in enumerate(names)}, 1000.0), (dict.fromkeys(names, 0.5), 9.0)])
    monkeypatch.setattr(benchmark, "layer_times", lambda *_: next(taken))
    capsys.readouterr()
    export.main(["--benchmark", path, "--latency-table", "times.csv", "--arch", "net.py:net", "--batch", "2"])
    said, rows = capsys.readouterr().out, list(csv.DictReader(pathlib.Path("times.csv").read_text().splitlines()))
    found = {(row["layer"], int(row["weight_bits"]), int(row["act_bits"])): float(row["ms"]) for row in rows}
    assert found.keys() == {(name, *pair) for name in searched for pair in itertools.product(range(2, 9), repeat=2)} | {
        (name, 8, 8) for name in names if name not in searched}
    assert all(found[name, *pair] == (0.5 if pair == (8, 8) else 2.0**names.index(name))
               for name in searched for pair in itertools.product(range(2, 9), repeat=2))
    rest = 1000 - sum(2.0**index for index in range(len(names)))
    assert found["stem", 8, 8] == 0.5 + rest and found["last", 8, 8] == 0.5
    assert f"times.csv: {len(searched)} searched layers at 49 pairs of bit-widths, batch 2" in said
    predicted = sum(2.0**names.index(name) for name in searched) + 1 + rest
    assert (f"{PACKED} at its own bits: {predicted:.2f} ms by the table" in said) == is_packed


@pytest.mark.parametrize(("flags", "remedy"), [
    (["--benchmark", PACKED, "--batch", "9"], "lower --batch"), (["--predict", PACKED, "image.png"], "give fewer images"),
    (["--benchmark", PACKED, "--latency-table", "a.csv"], "lower --batch"), ([FILE, "--output", "a"], "close other programs")])
@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    Exception("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9")])
def test_what_needs_too_much_memory_is_told_which_flag_is_about_it(flags, remedy, error, capsys, monkeypatch):
    for name in ("time_network", "predict", "export"):
        monkeypatch.setattr(export, name, lambda *_: (_ for _ in ()).throw(error))
    said = complaint(capsys, export.main, *flags)
    assert "out of memory" in said and remedy in said and "dataloader" not in said


def test_wrong_flags_and_files_are_refused_in_one_line(capsys):
    pathlib.Path("net.py").write_text(OWN)
    write_checkpoint("net.py:tiny", 12)
    export.main([FILE, "--output", PACKED, "--arch", "net.py:tiny"])
    save_checkpoint("bare", {"state_dict": {}})
    for arguments, message in (
            (["--benchmark", PACKED, "--inspect", PACKED], "--benchmark stands alone"),
            (["--inspect", PACKED, "--batch", "2"], "--batch: belongs to --benchmark FILE"),
            (["--benchmark", PACKED, "--batch", "0"], "argument --batch: found 0, expected a whole number of at least 1"),
            (["--benchmark", PACKED, "--batch", "1", "2", "--latency-table", "a"], "a latency table is of one batch size"),
            (["--benchmark", PACKED, "--threads", "9" * 20], "--threads: found 99999999999999999999, expected at most 65536"),
            (["--benchmark", PACKED, "--threads", "60000"], "--threads: found 60000, this machine has"),
            (["--benchmark", PACKED, "--arithmetic", "float"], "--arithmetic: belongs to --predict FILE"),
            (["--benchmark", PACKED, "--fold-bn"], "--benchmark stands alone; leave out --fold-bn"),
            (["--benchmark", PACKED, FILE], f"--benchmark stands alone; leave out {FILE}"),
            (["--benchmark", PACKED, "--latency-table", f"./{PACKED}"], f"--latency-table: ./{PACKED} is also read"),
            (["--benchmark", PACKED, "--latency-table", "."], "--latency-table: . is a folder"),
            (["--benchmark", "none", "--latency-table", "net.py/a/b"], "--latency-table: net.py/a/b cannot be written, since"),
            (["none", "--output", "net.py/a"], "--output: net.py/a cannot be written"),
            (["none", "--onnx", "net.py/a"], "--onnx: net.py/a cannot be written"),
            (["none", "--qonnx", "."], "--qonnx: . is a"),
            (["none", "--output", "a", "--report", "net.py/a"], "--report: net.py/a cannot be written"),
            (["--benchmark", FILE, "--arch", "net.py:tiny"], f"{FILE}: not a packed model, but perhaps a checkpoint"),
            (["--benchmark", PACKED], "is not run unasked"), (["--benchmark", "none"], "none: cannot read the packed model"),
            (["--benchmark", FILE, "--latency-table", "a"], "is not run unasked"),
            (["--benchmark", "bare", "--latency-table", "a"], "bare: does not say which network it holds")):
        assert message in complaint(capsys, export.main, *arguments)
    assert not pathlib.Path("a").exists()
