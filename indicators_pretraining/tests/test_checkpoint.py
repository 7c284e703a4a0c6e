"""Checkpoints: whole on disk, readable without running code, with LIMPQ's published names."""

import errno
import hashlib
import os
import pickle
import resource
import zipfile
from collections import OrderedDict

import pytest
import torch
from torchvision.models import resnet50

from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.run_folder import RunFolder, find_checkpoint
from engine.schema import ResumeConfig
from model.weights import load_state
from network import build_network
from process import joint_step
from quan.config import ExceptionConfig, QuanConfig
from schema import IndicatorsConfig
from util.config import to_plain
from util.distributed import random_states, set_random_states
from util.errors import UserError
from util.exchange import write_atomically
from util.formats import is_name, number, record, sequence, table_of, whole

BITS = [6, 5, 4, 3, 2]


def published_names(prefix="module."):
    """A stage-1 state_dict of ResNet-50 with the names that LIMPQ's checkpoints have."""
    state = {}
    for name, tensor in resnet50().state_dict().items():
        module, _, entry = name.rpartition(".")
        is_norm = "bn" in module or "downsample.1" in module
        if module == "bn1":
            state[f"{prefix}bn1.bn.{entry}"] = tensor
        elif is_norm:
            state.update({f"{prefix}{module}.bns.{index}.{entry}": tensor.clone() for index in range(5)})
        else:
            state[f"{prefix}{name}"] = tensor
        if not is_norm and entry == "weight" and module not in ("conv1", "fc"):
            for quantizer in ("quan_w_fn", "quan_a_fn"):
                state[f"{prefix}{module}.{quantizer}.s"] = torch.rand(5) + 0.1
                state[f"{prefix}{module}.{quantizer}.init_state"] = torch.ones(5)
    return state


def test_a_checkpoint_with_limpqs_names_loads(tmp_path):
    state = published_names()
    torch.save({"epoch": 3, "arch": "resnet50", "state_dict": state, "extras": {}, "optimizer": {}}, tmp_path / "c")
    excepts = {name: ExceptionConfig() for name in ("conv1", "bn1", "fc")}
    config = IndicatorsConfig(arch="resnet50", target_bits=BITS, quan=QuanConfig(excepts=excepts))
    model = build_network(config, 1000, 64, None, torch.device("cpu")).model
    load_state(model, load_checkpoint(tmp_path / "c")["state_dict"], "c")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"module.{name}"]), name


def small(seed=0):
    config = IndicatorsConfig(arch="resnet20", target_bits=[4, 2], seed=seed)
    torch.manual_seed(seed)
    return build_network(config, 10, 8, None, torch.device("cpu"))


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    network = small()
    optimizer = torch.optim.SGD(network.model.parameters(), lr=0.1, momentum=0.9)
    images, target = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    chosen = dict.fromkeys(network.switch.layers, 2)
    joint_step(network.model, network.switch, images, target, torch.nn.CrossEntropyLoss(), optimizer, chosen)
    path = str(tmp_path / "a_checkpoint.pth.tar")
    save_checkpoint(path, {"state_dict": network.model.state_dict(), "optimizer": optimizer.state_dict(),
                           "random_states": random_states(), **network.metadata})
    expected = torch.rand(3)
    checkpoint = load_checkpoint(path)
    other = small(seed=1)
    load_state(other.model, checkpoint["state_dict"], path)
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor), name
    set_random_states(checkpoint["random_states"])
    assert torch.equal(torch.rand(3), expected)
    momentum = optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(checkpoint["optimizer"]["state"][0]["momentum_buffer"], momentum)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_made_to_run_code_runs_none(tmp_path):
    torch.save({"state_dict": {}, "x": Evil(str(tmp_path / "ran"))}, tmp_path / "evil")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))
    for name in ("evil", "pickle"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(str(path), {"state_dict": {"a": torch.ones(100)}})
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:10], b"", b"hello", whole[:200] + b"\0" * 50 + whole[250:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="c.pth.tar"):
            load_checkpoint(str(path))
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="no state_dict"):
        load_checkpoint(str(path))
    for entry in ({"version": "1.0"}, {"epoch": None}, {"config": "x"}, {"bits": 4}, {"layers": []}):
        save_checkpoint(str(path), {"state_dict": {}, **entry})
        with pytest.raises(UserError, match=f"c.pth.tar: {next(iter(entry))}: found"):
            load_checkpoint(str(path))
    save_checkpoint(str(path), {"state_dict": {"a": 3}})
    with pytest.raises(UserError, match="names and tensors only"):
        load_checkpoint(str(path))
    save_checkpoint(str(path), {"state_dict": {}, "version": 99})
    with pytest.raises(UserError, match="newer version"):
        load_checkpoint(str(path))
    with pytest.raises(UserError, match="No such file"):
        load_checkpoint(str(tmp_path / "nothing"))


def test_every_changed_byte_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(str(path), {"arch": "a", "state_dict": {"a": torch.ones(3)}, "config": {}, "random_states": []})
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1:])
        with pytest.raises(UserError, match="c.pth.tar: (damaged|not a checkpoint)"):
            load_checkpoint(str(path))
    for content in (whole[:-1], whole[:-71], whole[:-73] + b"\0\0", whole + b"\0", whole + whole, whole[1:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="c.pth.tar: (damaged|not a checkpoint)"):
            load_checkpoint(str(path))


def test_a_checkpoint_with_its_checksum_is_a_plain_archive_to_others(tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(str(path), {"state_dict": {"a": torch.ones(3)}})
    for memory_map in (False, True):
        content = torch.load(path, weights_only=True, mmap=memory_map)
        assert content["version"] == 2 and torch.equal(content["state_dict"]["a"], torch.ones(3))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")
    whole = path.read_bytes()
    assert whole[-64:].decode() == hashlib.sha256(whole[:-73] + b"\0\0").hexdigest()


def test_checkpoints_without_a_checksum_are_read_as_before_and_newer_ones_not(tmp_path):
    path = str(tmp_path / "c")
    for content in ({"version": 1, "state_dict": {"a": torch.ones(3)}}, {"module.a": torch.ones(3)}):
        for is_zip in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=is_zip)
            assert torch.equal(load_checkpoint(path)["state_dict"]["a"], torch.ones(3))
    torch.save({"version": 2, "state_dict": {}, "arch": "resnet20", "config": {}, "random_states": []}, path)
    with pytest.raises(UserError, match="its checksum is missing"):
        load_checkpoint(path)


MEMORY_BOMBS = {
    "bytes": b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x40\x85R.",
    "tensor": b"ctorch\nTensor\n\x8a\x05\0\0\0\0\x40\x85R.",
    "lists of lists": b"]q\0" + b"".join(b"](" + b"h%c" % n * 30 + b"eq%c" % (n + 1) for n in range(40)) + b".",
    "a list of itself": b"]q\0h\0a."}


@pytest.mark.parametrize("name", MEMORY_BOMBS)
def test_a_small_checkpoint_takes_little_memory(tmp_path, name):
    bomb = b"\x80\x02}X\x01\0\0\0x" + MEMORY_BOMBS[name][:-1] + b"sX\x0a\0\0\0state_dict}s."
    path = tmp_path / "c"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/data.pkl", bomb)
        archive.writestr("c/version", "3\n")
        archive.writestr("c/byteorder", "little")
    with pytest.raises(UserError, match="c: (damaged|not a checkpoint)"):
        load_checkpoint(str(path))


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    path = str(tmp_path / "c")
    for tensor in (torch.ones(1).expand(10**12), torch.ones(2, device="meta"), torch.ones(2).to_sparse(),
                   torch.ones(2, dtype=torch.complex64)):
        torch.save({"state_dict": {"a": tensor}}, path)
        with pytest.raises(UserError, match="c: (damaged|not a checkpoint)"):
            load_checkpoint(path)


@pytest.mark.parametrize(("key", "value"), [
    ("bits", ["4"]), ("bits", [4, 4]), ("weight_bits", {"a": 9}), ("signed", {"a": 1}), ("layers", {"a": {"signed": {}}}),
    ("layers", {"a": {"shape": torch.ones(1)}}),
    ("fixed", {"a": {"shape": torch.Size([1])}}), ("batchnorms", {"a": 3}), ("config", {"a": torch.ones(2)}), ("epoch", -1),
    ("extras", {"top1": "x"}), ("extras", {"top1": 10**300}), ("optimizer", {"state": [], "param_groups": []}),
    ("optimizer", {"state": {0: {"momentum_buffer": torch.ones(7)}}, "param_groups": []}), ("level", 1.5),
    ("random_states", [{"torch": None, "python": [], "numpy": []}]), ("initial_sparsity", float("nan")),
    ("input_size", 0), ("arch", "a\nb")])
def test_an_entry_of_another_type_is_named(tmp_path, key, value):
    path = str(tmp_path / "c")
    save_checkpoint(path, {"state_dict": {"a": torch.ones(3)}, "config": {}, "act_bits": {}, "weight_bits": {}, key: value})
    with pytest.raises(UserError, match=f"c: {key}: "):
        load_checkpoint(path)


@pytest.mark.parametrize(("fits", "good", "bad"), [
    (number(0, 10**400), [0, 1.5, 10**400], [-1, True, "1", None, float("nan"), float("inf")]),
    (number(), [-1.5, 10**300], [10**400, float("nan"), float("inf")]), (whole(2), [0, 2], [-1, 3, 1.0, True]),
    (sequence(is_name, whole(2)), [["a", 1]], [["a"], ["a", 3], ["a", 1, 1], ("a", 1)]),
    (table_of(whole(2)), [{}, {"a": 1}], [{"a": 3}, {1: 1}, {"a\n": 1}, []]),
    (record({"a": is_name}, {"b": whole(2)}), [{"a": "x"}, {"a": "x", "b": 1}],
     [{}, {"b": 1}, {"a": 1}, {"a": "x", "b": 3}, {"a": "x", "c": 1}, OrderedDict(a="x"), []]),
    (record({}, others=whole(2)), [{}, {"c": 1}], [{"c": 3}, {1: 1}])])
def test_a_declaration_tells_what_it_names_from_everything_else(fits, good, bad):
    assert all(map(fits, good)) and not any(map(fits, bad))


def test_generators_take_only_states_of_their_own_size(tmp_path):
    states, path = random_states(), str(tmp_path / "c")
    for kind, index, value in (("numpy", 2, 10**6), ("numpy", 1, [0] * 3), ("numpy", 3, 2**40), ("python", 1, [-1] * 625),
                               ("python", 0, torch.ones(2))):
        changed = {**states[0], kind: [*states[0][kind][:index], value, *states[0][kind][index + 1:]]}
        save_checkpoint(path, {"state_dict": {}, "config": {}, "random_states": [changed]})
        with pytest.raises(UserError, match="c: random_states: found"):
            load_checkpoint(path)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    model = torch.nn.Linear(2, 2)
    for change, message in (({"bias": None}, "bias of this network is missing"), ({"extra": torch.ones(1)}, "extra is not"),
                            ({"weight": torch.ones(3, 2)}, r"weight has shape \[3, 2\]")):
        state = {**model.state_dict(), **change}
        with pytest.raises(UserError, match=message):
            load_state(model, {name: tensor for name, tensor in state.items() if tensor is not None}, "c")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failing_write_leaves_the_old_file_whole(tmp_path, monkeypatch, number):
    path = tmp_path / "file"
    write_atomically(str(path), b"old")

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    for size, needed in ((3 * 2**20, "; 3.0 MB are needed" if number == errno.ENOSPC else ""), (9, "")):
        with pytest.raises(UserError, match=rf"file: cannot write the file \({os.strerror(number)}{needed}\)"):
            write_atomically(str(path), bytes(size))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_larger_than_the_system_takes_leaves_the_old_one_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write the file .*; 2.0 MB are needed"):
            write_atomically(str(path), bytes(2 * 2**20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_folder_is_brought_to_the_disk_after_the_new_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_ino, os.listdir(tmp_path))))
    write_atomically(str(tmp_path / "file"), b"new")
    assert synced == [((tmp_path / "file").stat().st_ino, ["file.partial"]), (tmp_path.stat().st_ino, ["file"])]


def test_ctrl_c_leaves_no_partial_file(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(str(tmp_path / "file"), b"new")
    assert not list(tmp_path.iterdir())


def test_which_checkpoint_resume_path_stands_for(tmp_path):
    def config(path="auto", evaluate=False, lean=False):
        resume = ResumeConfig(path=path, lean=lean)
        return IndicatorsConfig(name="n", output_dir=str(tmp_path), resume=resume, eval=evaluate)

    folder = RunFolder.of(config())
    assert find_checkpoint(config(), folder) == find_checkpoint(config("none"), folder) == (None, False)
    assert find_checkpoint(config("other"), folder) == ("other", False)
    assert find_checkpoint(config("other", lean=True), folder) == ("other", True)
    for wrong in (config(evaluate=True), config("none", evaluate=True)):
        with pytest.raises(UserError, match="resume.path"):
            find_checkpoint(wrong, folder)
    folder.save({"epoch": 1, "state_dict": {}}, is_best=True)
    assert find_checkpoint(config(), folder) == (str(tmp_path / "n" / "n_checkpoint.pth.tar"), False)
    assert find_checkpoint(config(evaluate=True), folder) == (str(tmp_path / "n" / "n_best.pth.tar"), True)
    assert find_checkpoint(config("other", evaluate=True), folder) == ("other", True)
    assert find_checkpoint(config(folder.best), folder) == (folder.best, False)
    assert find_checkpoint(config("other", lean=True), folder) == (folder.last, False)  # it has started from there
    for wrong in (config("none"), config("other")):
        with pytest.raises(UserError, match="holds a run"):
            find_checkpoint(wrong, folder)


def test_a_damaged_newest_checkpoint_is_a_reason_to_go_back(tmp_path):
    config = IndicatorsConfig(name="n", output_dir=str(tmp_path), resume=ResumeConfig(path=str(tmp_path / "n" / "earlier")))
    folder = RunFolder.of(config)
    folder.save({"epoch": 1, "state_dict": {}, "config": to_plain(config)}, is_best=False)
    assert find_checkpoint(config, folder) == (folder.last, False)  # that has happened
    with open(folder.last, "r+b") as file:
        file.truncate(100)
    assert find_checkpoint(config, folder) == (config.resume.path, False)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, kind):
    (os.mkfifo if kind == "pipe" else os.mkdir)(tmp_path / "c")
    with pytest.raises(UserError, match=r"c: cannot read the checkpoint \(not a regular file\)"):
        load_checkpoint(tmp_path / "c")
