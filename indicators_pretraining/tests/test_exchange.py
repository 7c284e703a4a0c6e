"""Indicators and policies: read back as written, refused when they are something else."""

import collections
import pickle
import re

import pytest
import torch

import importance_extractor
from engine.checkpoint import save_checkpoint
from indicators import extract, extract_all, not_growing
from quan.quantizer.lsq import SMALLEST_STEP
from util.errors import UserError
from util.exchange import read_indicators, read_policy, write_indicators, write_policy

CONTENT = {"weight": {"a": {4: 0.1, 2: 0.3}, "b": {4: 0.2, 2: 0.1}}, "act": {"a": {4: 1.0, 2: 2.0}, "b": {4: 1.0, 2: 1.0}},
           "layer_name": ["a", "b"], "arch": "resnet20"}
POLICY = {"arch": "resnet20", "layer_name": ["a", "b"], "weight_bits": [4, 2], "act_bits": [3, 3]}


def test_indicators_come_back_as_written_in_the_published_format(tmp_path):
    path = str(tmp_path / "i.pkl")
    write_indicators(path, CONTENT)
    assert read_indicators(path) == CONTENT
    with open(path, "rb") as file:
        assert pickle.load(file)["weight"]["a"] == {"4": 0.1, "2": 0.3}


@pytest.mark.parametrize(("names", "plain"), [
    (["module.a", "module.b.c"], ["a", "b.c"]), (["module.a", "modules"], ["module.a", "modules"]),
    (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]), (["_orig_mod.module.module.a"], ["a"]),
    (["module.a", "b"], ["module.a", "b"]), (["module"], ["module"])])
def test_wrappers_are_dropped_only_where_every_name_has_them(tmp_path, names, plain):
    path, table = tmp_path / "i.pkl", {name: {2: 1.0} for name in names}
    path.write_bytes(pickle.dumps({"weight": table, "act": table, "layer_name": names}))
    assert read_indicators(str(path))["layer_name"] == list(read_indicators(str(path))["weight"]) == plain
    write_indicators(str(path), {"weight": table, "act": table, "layer_name": names})  # ours: as the network has them
    assert read_indicators(str(path))["layer_name"] == names


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("content", [
    Evil(), {"weight": Evil(), "act": {}, "layer_name": ["a"]}, collections.OrderedDict(), [1], {"weight": {}},
    {**CONTENT, "layer_name": []}, {**CONTENT, "layer_name": ["a", "c"]}, {**CONTENT, "layer_name": ["a", "a"]},
    {**CONTENT, "weight": {"a": {"4": "much"}, "b": {}}}, {**CONTENT, "act": {"a": {4: float("nan")}, "b": {}}},
    {**CONTENT, "act": {"a": {"four": 1.0}, "b": {}}}, {**CONTENT, "act": {"a": 3, "b": {}}}])
def test_other_pickles_are_refused_and_run_nothing(tmp_path, capsys, content):
    path = tmp_path / "i.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="i.pkl"):
        read_indicators(str(path))
    assert "code ran" not in capsys.readouterr().out


def test_truncated_and_foreign_bytes_are_refused(tmp_path):
    path = tmp_path / "i.pkl"
    write_indicators(str(path), CONTENT)
    whole = path.read_bytes()
    for content in (*(whole[:length] for length in range(0, len(whole), 7)), b"\x80\x04.", b"hello"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="i.pkl"):
            read_indicators(str(path))


def test_every_changed_byte_of_indicators_is_noticed(tmp_path):
    path = tmp_path / "i.pkl"
    write_indicators(str(path), CONTENT)
    whole = path.read_bytes()
    changed = [whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1:] for position in range(len(whole))]
    changed += [whole[:length] for length in range(len(whole))]
    for data in [*changed, whole + b"\n", whole + whole, whole[-72:] + whole[:-72], whole[10:]]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=path.name):
            read_indicators(str(path))


def test_indicators_without_a_checksum_are_read_as_before(tmp_path):
    path = tmp_path / "i.pkl"
    path.write_bytes(pickle.dumps(CONTENT))
    assert read_indicators(str(path)) == CONTENT
    path.write_bytes(pickle.dumps(CONTENT) + b"more")
    with pytest.raises(UserError, match="i.pkl: not an indicators file .4 bytes follow its end"):
        read_indicators(str(path))
    path.write_bytes(pickle.dumps({**CONTENT, "format": 3}))
    with pytest.raises(UserError, match="i.pkl: written by a newer version"):
        read_indicators(str(path))


@pytest.mark.parametrize("data", [
    b"]r\xff\xff\xff\x7f.", b"\x8e" + b"\xff" * 7 + b"\x00.", b"\x96\0\0\0\0\x20\0\0\0.", b"\x8b\xff\xff\xff\x7f.",
    b"]q\0" + b"".join(b"](" + b"h%c" % n * 30 + b"eq%c" % (n + 1) for n in range(40)) + b"."])
def test_a_small_pickle_takes_little_memory(tmp_path, data):
    path = tmp_path / "i.pkl"
    path.write_bytes(b"\x80\x04" + data)
    with pytest.raises(UserError, match="i.pkl: not an indicators file"):
        read_indicators(str(path))


@pytest.mark.parametrize(("begin", "end"), [("", ""), ("format: 2\n", f"# sha256:{'0' * 64}\n"), ("format: 2\n", "")])
def test_a_policy_edited_by_hand_is_taken_as_it_is(tmp_path, begin, end):
    path = tmp_path / "p.yaml"
    write_policy(str(path), POLICY)
    assert "sha256" not in path.read_text() and "format" not in path.read_text()
    path.write_text(f"# mine\n{begin}" + path.read_text().replace("weight_bits: [4, 2]", "weight_bits: [4, 3]  # more") + end)
    assert read_policy(str(path)) == {**POLICY, "weight_bits": [4, 3]}


def test_layers_of_a_policy_are_named_as_they_are_written(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("\ufefflayer_name: [0, 1.10, on, 012]\nweight_bits: [04, 08, 2, 3]\nact_bits: [4, 4, 4, 4]\n")
    policy = read_policy(path)
    assert policy["layer_name"] == ["0", "1.10", "on", "012"] and policy["weight_bits"] == [4, 8, 2, 3]
    assert {type(bit) for bit in policy["weight_bits"] + policy["act_bits"]} == {int}


def test_a_policy_comes_back_as_written_with_its_lists_on_one_line_each(tmp_path):
    path = tmp_path / "p.yaml"
    write_policy(str(path), {**POLICY, "weight_bits": [4] * 60, "act_bits": [2] * 60,
                             "layer_name": [f"layer{i}" for i in range(60)]})
    assert read_policy(str(path))["weight_bits"] == [4] * 60
    assert f"weight_bits: {[4] * 60}\n" in path.read_text()


@pytest.mark.parametrize("change", [{"weight_bits": [4]}, {"weight_bits": [4, 9]}, {"act_bits": "3 3"}, {"act_bits": [3, 2.5]},
                                    {"layer_name": ["a", "a"]}, {"layer_name": None}, {"act_bits": [True, 3]}])
def test_a_policy_that_is_none_is_refused(tmp_path, change):
    path = str(tmp_path / "p.yaml")
    write_policy(path, {**POLICY, **change})
    with pytest.raises(UserError, match="p.yaml"):
        read_policy(path)


def checkpoint(**steps):
    state = {f"{layer}.{quantizer}.{entry}": torch.tensor([0.1, 0.3]) if entry == "s" else torch.ones(2)
             for layer in ("a", "b") for quantizer in ("quan_w_fn", "quan_a_fn") for entry in ("s", "init_state")}
    state.update({name.replace("__", "."): tensor for name, tensor in steps.items()})
    return {"state_dict": {name: tensor for name, tensor in state.items() if tensor is not None}, "bits": [4, 2],
            "layers": {"a": {}, "b": {}}, "fixed": {}, "arch": "resnet20", "input_size": 16}


def test_indicators_are_the_trained_step_sizes():
    content = extract(checkpoint(b__quan_w_fn__s=torch.tensor([0.5, 0.25])), "c")
    assert content["weight"] == {"a": {4: pytest.approx(0.1), 2: pytest.approx(0.3)}, "b": {4: 0.5, 2: 0.25}}
    assert content["layer_name"] == ["a", "b"] and content["bits"] == [4, 2] and content["arch"] == "resnet20"
    assert not_growing(content) == [("weight", "b", 2)]


def test_indicators_say_what_they_were_trained_on():
    config = {"dataloader": {"dataset": "digits", "data_fraction": 0.5, "path": "/home/me"}, "epochs": 3, "lr": 0.01,
              "name": "x"}
    steps = {"a.quan_w_fn.s": torch.tensor([0.1]), "a.quan_a_fn.s": torch.tensor([0.2])}
    found = extract({"state_dict": steps, "bits": [4], "config": config}, "file")
    assert found["trained"] == {"dataset": "digits", "data_fraction": 0.5, "epochs": 3, "lr": 0.01}
    assert "trained" not in extract({"state_dict": steps, "bits": [4]}, "file")


def test_the_indicator_of_per_channel_steps_is_their_mean():
    content = extract(checkpoint(a__quan_w_fn__s=torch.tensor([[0.1, 0.3], [0.2, 0.6]])), "c")
    assert content["weight"]["a"] == {4: pytest.approx(0.2), 2: pytest.approx(0.4)}


def test_channels_of_which_nothing_remains_do_not_count_in_the_mean():
    steps, mask = torch.tensor([[0.1, 0.3, 5.0], [0.2, 0.6, 7.0]]), torch.zeros(3, 2, 1, 1, dtype=torch.bool)
    mask[0], mask[1, 1] = True, True
    content = extract({**checkpoint(a__quan_w_fn__s=steps), "masks": {"a.weight": mask}}, "c")
    assert content["weight"]["a"] == {4: pytest.approx(0.2), 2: pytest.approx(0.4)}
    content = extract({**checkpoint(a__quan_w_fn__s=steps), "masks": {"a.weight": mask & False}}, "c")
    assert content["weight"]["a"] == {4: pytest.approx(1.8), 2: pytest.approx(2.6)}  # nothing remains: all count
    with pytest.raises(UserError, match="c: masks: a.weight is not a mask of 3 channels"):
        extract({**checkpoint(a__quan_w_fn__s=steps), "masks": {"a.weight": mask[:2]}}, "c")


@pytest.mark.parametrize(("steps", "message"), [
    ({"a__quan_w_fn__init_state": torch.ones(1)}, "a.quan_w_fn: found 1 marks of trained step sizes"),
    ({"b__quan_a_fn__s": None}, "b.quan_a_fn: found nothing"),
    ({"b__quan_w_fn__s": torch.ones(3)}, "b.quan_w_fn: found 3 step sizes"),
    ({"a__quan_w_fn__s": torch.tensor([float("nan"), 0.2])}, "a.quan_w_fn: the step size at 4 bits is nan"),
    ({"a__quan_a_fn__init_state": torch.tensor([1.0, 0.0])}, "a.quan_a_fn: the step size at 2 bits was never trained")])
def test_a_step_size_that_cannot_be_an_indicator_names_its_layer(steps, message):
    with pytest.raises(UserError, match=message):
        extract(checkpoint(**steps), "c")


def test_what_met_nothing_but_zeros_needs_no_bits_unless_all_did(capsys):
    waiting = {"a__quan_a_fn__s": torch.ones(2), "a__quan_a_fn__init_state": torch.zeros(2)}
    content = extract(checkpoint(**waiting), "c")
    assert content["act"]["a"] == {4: SMALLEST_STEP, 2: SMALLEST_STEP} and content["weight"]["a"][4] > SMALLEST_STEP
    assert "met in training was zero, so any bit-width serves them: a.quan_a_fn\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="c: a.quan_w_fn: the step sizes were never trained, nor were any others"):
        extract(checkpoint(**{f"{layer}__{kind}__init_state": torch.zeros(2) for layer in "ab"
                              for kind in ("quan_w_fn", "quan_a_fn")}), "c")


def test_bits_come_from_the_checkpoint_and_only_else_from_the_command_line():
    bare = {"state_dict": checkpoint()["state_dict"]}
    with pytest.raises(UserError, match="--b"):
        extract(bare, "c")
    assert list(extract(bare, "c", [8, 3])["weight"]["a"]) == [8, 3]
    assert list(extract(checkpoint(), "c", [4, 2])["weight"]["a"]) == [4, 2]
    with pytest.raises(UserError, match=r"--b: found \[8, 3\], but c was trained at \[4, 2\]"):
        extract(checkpoint(), "c", [8, 3])
    with pytest.raises(UserError, match="--b: found"):
        extract(bare, "c", [4, 4])


ROW = {"kind": "conv", "params": 6, "signed": {"weight": True, "act": False}}


def trained_at(*bits, value=1.0, **changes):
    """A checkpoint trained at these bits alone: each step size is value / bit."""
    state = {f"{layer}.{quantizer}.s": torch.tensor([value / bit for bit in bits])
             for layer in ("a", "b") for quantizer in ("quan_w_fn", "quan_a_fn")}
    return {"state_dict": state, "bits": list(bits), "arch": "resnet20", "input_size": 16, "num_classes": 10,
            "layers": {"a": ROW, "b": ROW}, "fixed": {"fc": {"kind": "linear"}}, "products": {},
            "signed": {"a": False, "b": False, "fc": True}, **changes}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Writes checkpoints named one, two, ... and gives their names."""
    monkeypatch.chdir(tmp_path)

    def save(*checkpoints):
        for name, content in zip(("one", "two", "three"), checkpoints, strict=False):
            save_checkpoint(name, content)
        return ["one", "two", "three"][:len(checkpoints)]
    return save


def test_checkpoints_trained_apart_give_one_file_with_all_candidates_descending(saved):
    paths = saved(trained_at(2), trained_at(6, 3, value=2.0), trained_at(4, arch="resnet20"))
    importance_extractor.main([*paths, "--output", "i.pkl"])
    content, alone = read_indicators("i.pkl"), extract(trained_at(2), "c")
    assert content["bits"] == [6, 4, 3, 2]
    for kind in ("weight", "act"):
        assert content[kind] == {name: {6: pytest.approx(2 / 6), 4: 0.25, 3: pytest.approx(2 / 3), 2: 0.5} for name in "ab"}
        assert all(list(row) == [6, 4, 3, 2] for row in content[kind].values())
    assert {key: content[key] for key in alone if key not in ("weight", "act", "bits")} == \
        {key: alone[key] for key in alone if key not in ("weight", "act", "bits")}


def test_one_checkpoint_gives_what_it_holds_in_its_own_order(saved):
    [path] = saved(trained_at(2, 6, 4))
    assert extract_all([path]) == extract(trained_at(2, 6, 4), path) and extract_all([path])["bits"] == [2, 6, 4]


@pytest.mark.parametrize(("changes", "message"), [
    ({"arch": "resnet18"}, "arch: found 'resnet20' in one, but 'resnet18' in two"),
    ({"layers": {"b": ROW, "a": ROW}}, "layer_name: found ['a', 'b'] in one, but ['b', 'a'] in two"),
    ({"layers": {"a": ROW}}, "layer_name: found ['a', 'b'] in one, but ['a'] in two"),
    ({"layers": {"a": ROW, "b": {**ROW, "params": 7}}}, "layers.b.params: found 6 in one, but 7 in two"),
    ({"layers": {"a": ROW, "b": {**ROW, "signed": {"weight": True, "act": True}}}},
     "layers.b.signed.act: found False in one, but True in two"),
    ({"signed": {"a": False, "b": False, "fc": False}}, "signed.fc: found True in one, but False in two"),
    ({"fixed": {"fc": {"kind": "conv"}}}, "fixed.fc.kind: found 'linear' in one, but 'conv' in two"),
    ({"products": {"attention": 5}}, "products: found {} in one, but 'nothing' in two"),
    ({"num_classes": 7}, "num_classes: found 10 in one, but 7 in two"),
    ({"input_size": 32}, "input_size: found 16 in one, but 32 in two"),
    ({"bits": [6, 4]}, "two: was trained at 4 bits, as one was")])
def test_checkpoints_that_do_not_fit_each_other_are_named_with_the_key(saved, changes, message):
    paths = saved(trained_at(4, 3), trained_at(*changes.get("bits", [6, 2]), **changes))
    with pytest.raises(UserError, match=re.escape(message)):
        importance_extractor.main([*paths, "--output", "i.pkl"])


def test_several_checkpoints_say_their_candidates_themselves_and_are_not_written_over(saved):
    paths = saved(trained_at(4), {"state_dict": trained_at(2)["state_dict"]})
    with pytest.raises(UserError, match="two: does not say its candidate bit-widths, which each"):
        extract_all(paths)
    with pytest.raises(UserError, match="--b: goes with a single checkpoint"):
        extract_all(paths, [4])
    with pytest.raises(UserError, match="one: stands twice"):
        extract_all(["one", "one"])
    for path in paths:
        with pytest.raises(UserError, match=f"--output: {path} is also read by this command"):
            importance_extractor.main([*paths, "--output", path])
