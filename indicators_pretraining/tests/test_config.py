"""The typed configuration: what it accepts, and what it says of everything else."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import pickle
import re
import sys
import typing

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import passes
from engine.schema import DataConfig, describe_defaults
from schema import IndicatorsConfig, PruningConfig
from util.command import split_configuration
from util.config import (
    Scalar,
    build,
    decode_yaml,
    describe_idle,
    differing_keys,
    fit,
    load_config,
    option,
    plain,
    to_plain,
)
from util.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
LIMPQ_STYLE = """
name: IMP_resnet50
target_bits: [6, 5, 4, 3, 2]
gpu: '0,1,2,3'
output_dir: out
training_device: gpu
dataloader: {dataset: imagenet, num_classes: 1000, path: /data, batch_size: 64, workers: 8, deterministic: true,
             serialized: false, val_split: 0.0}
resume: {path: , lean: false}
log: {num_best_scores: 3, print_freq: 20}
arch: resnet50
freeze_weights: false
pre_trained: true
quan:
  act: {mode: lsq, bit: 3, per_channel: false, symmetric: false, all_positive: true}
  weight: {mode: lsq, bit: 3, per_channel: false, symmetric: false, all_positive: false}
  excepts:
    conv1:
      act: {bit: , all_positive: false}
      weight: {bit: }
    bn1:
      act: {bit: }
      weight: {bit: }
    fc:
      act: {bit: }
      weight: {bit: }
eval: false
epochs: 11
smoothing: 0.1
opt: sgd
lr: 1e-2
momentum: 0.9
weight_decay: 2.5e-5
sched: cosine
min_lr: 1e-6
decay_rate: 0.1
warmup_epochs: 0
warmup_lr: 1e-5
decay_epochs: 30
cooldown_epochs: 0
val_cycle: 50
"""


def read(tmp_path, text, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(IndicatorsConfig, [str(path)], overrides)


def test_a_file_with_every_key_of_limpq_is_read(tmp_path):
    config = read(tmp_path, LIMPQ_STYLE)
    assert config.resume.path == "auto" and config.lr == 0.01 and config.weight_decay == 2.5e-5
    assert config.quan.excepts["conv1"].weight.bit is None and config.quan.excepts["conv1"].act.all_positive is False
    assert config.quan.act.all_positive and config.dataloader.num_classes == 1000


AS_WRITTEN = ["1.10", "007", "0o10", "010", "1:30", "0x10", "0b11", "1_000", "1e3", "1.", ".inf", "-.INF", "on", "off", "yes",
              "No", "true", "TRUE", "2024-01-01", "2024-01-01T10:00:00Z", "=", "08", "+5", "v1", "00", "1e-05"]


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_text_is_what_stands_there(tmp_path, text):
    config = read(tmp_path, f"name: {text}\nwandb: {{tags: [{text}, '{text}']}}\nquan: {{excepts: {{{text}: }}}}\n"
                            f"prune: {{excepts: [{text}]}}\ndataloader: {{path: {text}}}\n", f"output_dir={text}")
    texts = [config.name, *config.wandb.tags, *config.quan.excepts, *config.prune.excepts, config.dataloader.path,
             config.output_dir]
    assert texts == [text] * 7 and {type(word) for word in texts} == {str}
    again = read(tmp_path, yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))
    assert again == config and again.name == text


def test_a_key_is_text_and_stands_once_whatever_its_form(tmp_path):
    config = read(tmp_path, "quan: {excepts: {0: {weight: {bit: 8}}, 1.10: , on: , null: , 012: }}",
                  'quan.excepts."0".weight.bit=4', "quan.excepts.012.act.bit=3")
    assert list(config.quan.excepts) == ["0", "1.10", "on", "null", "012"]
    assert config.quan.excepts["0"].weight.bit == 4 and config.quan.excepts["012"].act.bit == 3
    with pytest.raises(UserError, match="the key '0' stands twice"):
        read(tmp_path, "quan: {excepts: {0: , '0': }}")


@pytest.mark.parametrize(("text", "number"), [
    ("10", 10), ("010", 10), ("07", 7), ("08", 8), ("0010", 10), ("+5", 5), ("1_000", 1000), ("0x10", None), ("0b11", None),
    ("0o10", None), ("1:30", None), ("1:30:00", None), ("1e1", None), ("1.0", None), ("'10'", None), ("_1", None),
    ("on", None)])
def test_a_whole_number_is_decimal(tmp_path, text, number):
    for read_it in (lambda: read(tmp_path, f"epochs: {text}").epochs,
                    lambda: read(tmp_path, "name: run", f"epochs={text}").epochs,
                    lambda: read(tmp_path, f"weight_bits: [{text}]").weight_bits[0]):
        if number is None:
            with pytest.raises(UserError, match=f"a whole number, found .*{re.escape(text)}"):
                read_it()
        else:
            assert read_it() == number and type(read_it()) is int


@pytest.mark.parametrize(("text", "number"), [
    ("0.5", 0.5), ("1e-2", 0.01), ("1E-2", 0.01), ("1.e-2", 0.01), (".5", 0.5), ("01", 1), ("010", 10), ("08", 8),
    ("'1e-2'", 0.01), ("1:30", None), ("1:30.5", None), ("0x10", None), ("0o10", None), (".inf", None), ("on", None)])
def test_a_number_is_decimal(tmp_path, text, number):
    if number is None:
        with pytest.raises(UserError, match="lr: expected a number, found"):
            read(tmp_path, f"lr: {text}")
    else:
        lr = read(tmp_path, f"lr: {text}").lr
        assert lr == number and type(lr) is float


def test_the_files_that_are_here_say_what_they_said_to_yaml_1_1():
    def same(one, other):
        if isinstance(one, dict):
            assert [str(key) for key in one] == list(other)
            return all(same(value, other[str(key)]) for key, value in one.items())
        if isinstance(one, list):
            return len(one) == len(other) and all(map(same, one, other))
        value = plain(other)
        return type(one) is type(value) and one == value or one == str(other) and float(one) == value  # 1e-2 was text

    shipped = {path: path.read_bytes() for path in ROOT.rglob("*.yaml") if "results" not in path.parts}
    assert len(shipped) > 40
    for path, data in {**shipped, "LIMPQ": LIMPQ_STYLE.encode()}.items():
        assert same(yaml.safe_load(data), decode_yaml(data, path)), path


def test_nothing_but_plain_values_comes_out(tmp_path):
    text = ("gpu: [0, on, {a: 1.0}]\npre_trained: 1.10\n"
            "quan: {act: {all_positive: on}, excepts: {0: {act: {all_positive: no}}}}")
    config = to_plain(read(tmp_path, text))
    assert config["gpu"] == [0, True, {"a": 1.0}] and config["pre_trained"] == "1.10"
    assert config["quan"]["act"]["all_positive"] is True and config["quan"]["excepts"]["0"]["act"]["all_positive"] is False
    assert "Scalar" not in repr(pickle.dumps(config))
    assert fit(bool | str, Scalar("off", False), "", {}) is False
def test_keys_that_limpq_has_another_default_for_are_named_where_they_are_not_given(tmp_path):
    assert describe_defaults(read(tmp_path, LIMPQ_STYLE)) == ""
    assert describe_defaults(read(tmp_path, "epochs: 10\nsmoothing: 0\nmin_lr:", "weight_decay=2.5e-5")) == \
        "not given, so the defaults: min_lr 0 (LIMPQ: 1e-05); see docs/coming_from_limpq.md"
    assert describe_defaults(read(tmp_path, "min_lr: 0")) == "not given, so the defaults: epochs 10 (LIMPQ: 3), " \
        "smoothing 0 (LIMPQ: 0.1), weight_decay 0.0001 (LIMPQ: 2.5e-05); see docs/coming_from_limpq.md"
    assert describe_defaults(IndicatorsConfig()) == ""


def test_later_files_and_overrides_win_key_by_key(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("epochs: 3\ndataloader: {batch_size: 8, workers: 0}\n")
    second.write_text("dataloader: {batch_size: 16}\n")
    config = load_config(IndicatorsConfig, [first, second], ["dataloader.val_split=0.2", "target_bits=[4, 2]"])
    assert (config.epochs, config.dataloader.batch_size, config.dataloader.workers) == (3, 16, 0)
    assert (config.dataloader.val_split, config.target_bits) == (0.2, [4, 2])


@pytest.mark.parametrize(("text", "message"), [
    ("epochs: 3\nlearning_rat: 1", "learning_rat: unknown key"),
    ("dataloader: {batch_sise: 4}", "dataloader.batch_sise: unknown key; did you mean 'batch_size'?"),
    ("epochs: many", "epochs: expected a whole number, found 'many'"),
    ("epochs: 0", "epochs: found 0, allowed is at least 1"),
    ("epochs: true", "epochs: expected a whole number, found true"),
    ("lr: .nan", "lr: expected a number, found .nan"),
    ("eval: 'yes please'", "eval: expected true or false"),
    ("opt: sdg", "opt: expected one of sgd, momentum, adam, adamw, found 'sdg'; did you mean 'sgd'?"),
    ("dataloader: 5", "dataloader: expected a section, found 5"),
    ("target_bits: [4, 4]", "target_bits: found [4, 4], expected different bit-widths"),
    ("target_bits: [1, 4]", "target_bits: found [1, 4]"),
    ("target_bits: []", "target_bits: found []"),
    ("quan: {excepts: {conv1: {weight: {bits: 4}}}}", "quan.excepts.conv1.weight.bits: unknown key; did you mean 'bit'?"),
    ("quan: {excepts: {fc: {weight: {all_positive: true}}}}",
     "quan.excepts.fc.weight.all_positive: weights are always signed"),
    ("quan: {weight: {all_positive: true}}", "quan.weight.all_positive: weights are always signed"),
    ("name: a/b", "name: 'a/b' cannot name a folder"),
    ('name: "a\\0b"', "name: expected text, found 'a\\x00b'"),
    (f"name: {'n' * 300}", "cannot name a folder"),
    ("seed: 99999999999999999999999", "seed: found 99999999999999999999999, allowed is at least 0 and at most"),
    ("warmup_epochs: 20", "warmup_epochs: found 20"),
    ("min_lr: 1", "min_lr: found 1"),
    ("fp_model: true", "fp_model: full-precision networks are trained in quantization_training"),
    ("epochs: 1\nepochs: 2", "the key 'epochs' stands twice"),
    ("a: [1", "not valid YAML"),
    ("- 1", "expected 'key: value' lines"),
    ("", "the file is empty"),
    ("gpu: !!python/object/apply:os.system ['true']", "not valid YAML"),
])
def test_what_is_wrong_is_named_with_its_file(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "config.yaml")) and message in str(error.value)


def test_a_flood_of_aliases_is_refused(tmp_path):
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(UserError, match="aliases"):
        read(tmp_path, "\n".join(lines))


def test_an_alias_is_a_value_of_its_own(tmp_path):
    text = "quan: {excepts: {conv1: &blank {weight: {bit: }}, fc: *blank}}"
    config = read(tmp_path, text, "quan.excepts.fc.weight.bit=4")
    assert config.quan.excepts["fc"].weight.bit == 4 and config.quan.excepts["conv1"].weight.bit is None


def test_a_name_with_dots_stands_in_quotes(tmp_path):
    config = read(tmp_path, "epochs: 1", 'quan.excepts."layer1.0.conv1".weight.bit=4')
    assert config.quan.excepts["layer1.0.conv1"].weight.bit == 4


def test_activations_are_unsigned_unless_said_otherwise(tmp_path):
    assert read(tmp_path, "epochs: 1").quan.act.all_positive
    assert read(tmp_path, "quan: {act: {mode: lsq}}").quan.act.all_positive
    assert not read(tmp_path, "quan: {act: {all_positive: false}}").quan.act.all_positive


def test_aliases_that_multiply_are_refused(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 45)]
    with pytest.raises(UserError, match="more than 100000 values"):
        read(tmp_path, "\n".join(lines))


@pytest.mark.parametrize("value", [
    "!!int ''", "!!float x", "!!bool x", "!!timestamp 2001-01-01", "!!set {a}",
    "!!binary eA==", "!!int 0x10", "!!int 1:30", "!!float 1:30", "9" * 400,
    "[" * 3000, "{a: " * 60, "{0x" + "f" * 9999 + ": 1}"])
def test_a_value_that_is_not_plain_is_refused_wherever_it_stands(tmp_path, value):
    with pytest.raises(UserError, match="config.yaml: (line 1 )?not valid YAML"):
        read(tmp_path, f"gpu: {value}")  # the one key that takes any value


def test_merge_keys_that_multiply_are_refused(tmp_path):
    lines = ["m0: &m0 {a: 1, b: 2}"] + [f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in range(1, 40)]
    # PyYAML from 6.0.4 on takes each key once, so that nothing multiplies.
    with pytest.raises(UserError, match="more than 100000 values|m0: unknown key"):
        read(tmp_path, "\n".join(lines))


def test_a_message_is_one_printable_line(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, '"a\\n\\x1b[31mb": 1')
    assert str(error.value).endswith("config.yaml: a [31mb: unknown key")


def test_a_file_too_large_for_a_configuration_is_not_parsed(tmp_path):
    with pytest.raises(UserError, match="config.yaml: cannot read the file .larger than 0.25 MiB"):
        read(tmp_path, "#" * 10**6)


def test_an_alias_of_itself_is_refused(tmp_path):
    with pytest.raises(UserError, match="not valid YAML"):
        read(tmp_path, "quan: &loop {excepts: *loop}")


@pytest.mark.parametrize("override", ["epochs", "=3", ".=3", "epoch=3", "dataloader.batch_size=x"])
def test_a_wrong_override_is_named(tmp_path, override):
    with pytest.raises(UserError) as error:
        read(tmp_path, "epochs: 2", override)
    assert "\n" not in str(error.value)


def test_a_path_may_hold_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["lr=0.1.yaml", "runs=all/lr=0.1/config.yaml", "runs=all/lr=0.1/plain"]
    for file in files:
        pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(file).write_text("epochs: 1")
    keys = ["policy=../x.yaml", "name=lr=0.1.yaml", 'quan.excepts."a/b".weight.bit=4', "output_dir=out=put/x.yml",
            "lr=0.2.yaml", "out/x=3"]
    missing = ["runs/lr=0.1/nowhere.yaml", str(tmp_path / "a=b.yml")]
    assert split_configuration([*files, *keys, *missing]) == ([*files, *missing], keys)
    assert load_config(IndicatorsConfig, files[:1], ["lr=1"]).epochs == 1


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot read the file \(No such file"):
        load_config(IndicatorsConfig, ["nowhere.yaml"])


JUNK = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3))


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfname: one\r\nepochs: 3\r\n", "name: one\nepochs: 3".encode("utf-8-sig")])
def test_a_byte_order_mark_and_the_ends_of_windows_lines_are_no_part_of_it(tmp_path, data):
    (tmp_path / "config.yaml").write_bytes(data)
    config = load_config(IndicatorsConfig, [tmp_path / "config.yaml"])
    assert (config.name, config.epochs) == ("one", 3)


@pytest.mark.parametrize(("data", "message"), [
    ("name: é".encode("utf-16"), "the file is UTF-16 text; save it as UTF-8"),
    ("name: é".encode("utf-16-be"), "cannot read the file"),
    ("a: 1\nname: é\n".encode("latin-1"), "line 2 is not UTF-8 text"),
    (b"name: a\0b", "not text"),
])
def test_other_encodings_are_named(tmp_path, data, message):
    (tmp_path / "config.yaml").write_bytes(data)
    with pytest.raises(UserError, match=f"config.yaml: .*{message}"):
        load_config(IndicatorsConfig, [tmp_path / "config.yaml"])


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(IndicatorsConfig.__dataclass_fields__)), JUNK, max_size=6))
def test_junk_values_give_a_config_or_a_user_error(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("junk") / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    try:
        assert isinstance(load_config(IndicatorsConfig, [path]), IndicatorsConfig)
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("is_kept", [True, False])
def test_freed_memory_is_kept_unless_the_key_turns_it_off(tmp_path, monkeypatch, is_kept):
    calls = []
    monkeypatch.setattr(passes, "keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setattr(passes.kernel, "use", lambda *_: None)
    passes.prepare(read(tmp_path, "name: run" if is_kept else "keep_freed_memory: false"), None, torch.device("cpu"))
    assert calls == ["kept"] * is_kept


def test_a_config_survives_being_written_and_read(tmp_path):
    config = read(tmp_path, LIMPQ_STYLE)
    assert read(tmp_path, yaml.safe_dump(to_plain(config))) == config


BITS = "target_bits, or a policy, says the bits"


@pytest.mark.parametrize(("text", "line"), [
    ("epochs: 3", ""), ("quan: {weight: {bit: }, act: {init: lsq}}\ngpu: \nprune: ", ""),
    ("quan: {weight: {bit: 4}, act: {bit: 3}}", f"quan.weight.bit ({BITS}), quan.act.bit ({BITS})"),
    ("quan: {act: {init: three_sigma}, weight: {init: three_sigma}}",
     "quan.act.init (activations start from their first batch)"),
    ("gpu: 0,1\ndataloader: {serialized: true}", "gpu (a note), dataloader.serialized (a note)"),
    ("weight_bits: 4\nact_bits: [3]",
     "weight_bits (quantization_training reads it), act_bits (quantization_training reads it)"),
    ("decay_rate: 0.5\ndecay_epochs: 7", "decay_rate (sched: cosine), decay_epochs (sched: cosine)"),
    ("sched: step\ndecay_rate: 0.5\ndecay_epochs: 7\nmin_lr: 1e-4", ""),
    ("sched: multistep\ndecay_rate: 0.5\ndecay_epochs: [3, 7]", ""),
    ("sched: constant\nmin_lr: 1e-4", "min_lr (sched: constant)"),
    ("warmup_lr: 0.1", "warmup_lr (no warmup_epochs)"), ("warmup_lr: 0.1\nwarmup_epochs: 1", ""),
    ("opt: adamw\nmomentum: 0.5", "momentum (opt: adamw)"), ("momentum: 0.5", ""),
    ("prune: {levels: 2}", "prune (pruning.py reads it)"),
    ("compile: true", "compile (kernels and cuda_graphs do more)"),
])
def test_keys_that_nothing_reads_are_named(tmp_path, text, line):
    assert describe_idle(read(tmp_path, text)) == (f"without effect here: {line}" if line else "")


def test_pruning_names_the_keys_of_joint_training(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("target_bits: [4, 2]\nquan: {act: {bit: 3}}\nprune: {levels: 2}")
    config = load_config(PruningConfig, [path])
    assert describe_idle(config) == "without effect here: target_bits (main.py reads it), quan (main.py reads it)"
    path.write_text("prune: {method: one_shot, target_sparsity: 0.5, amount: 0.3}")
    assert "prune.amount (" in describe_idle(load_config(PruningConfig, [path]))


def test_differing_keys_are_named_with_their_section(tmp_path):
    old, new = read(tmp_path, LIMPQ_STYLE), read(tmp_path, LIMPQ_STYLE, "dataloader.batch_size=1", "lr=0.5")
    assert differing_keys(to_plain(old), to_plain(new)) == ["dataloader.batch_size", "lr"]


@pytest.mark.parametrize("path", sorted(pathlib.Path(__file__).parents[1].glob("config_*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path):
    assert load_config(IndicatorsConfig, [path]).name


def misfits(value, schema, where=""):
    """Where a value differs from a JSON schema, of the words that docs/schemas uses."""
    kinds = {"object": dict, "array": list, "boolean": bool, "null": type(None), "integer": int, "number": (int, float),
             "string": str}
    names = schema.get("type", [])
    fits = any(isinstance(value, kinds[name]) and (name == "boolean" or not isinstance(value, bool))
               for name in ([names] if isinstance(names, str) else names))
    if ("type" in schema and not fits) or ("enum" in schema and value not in schema["enum"]):
        return [where]
    arms = [misfits(value, arm, where) for arm in schema.get("anyOf", [])]
    found = min(arms, key=len, default=[])
    if isinstance(value, dict):
        for key, inner in value.items():
            allowed = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            found += misfits(inner, allowed, f"{where}.{key}") if allowed is not False else [f"{where}.{key}"]
    if isinstance(value, list):
        found += [place for inner in value for place in misfits(inner, schema.get("items", {}), f"{where}[]")]
    if isinstance(value, (int, float)) and not (
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)):
        found.append(where)
    return found


STAGES = ("indicators_pretraining", "quantization_search", "quantization_training")
SHIPPED = [path for folder in (*STAGES, "experiments/stage_configs", "measurements")
           for path in sorted((ROOT / folder).glob("*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_file_names_its_json_schema_and_fits_it(path):
    named = re.match(r"# yaml-language-server: \$schema=(.+)\n", path.read_text())[1]
    schema = json.loads((path.parent / named).read_text())
    assert pathlib.Path(named).stem == path.parent.name or path.parent.name not in STAGES
    assert misfits(plain(decode_yaml(path.read_bytes(), path)), schema) == []


@pytest.mark.parametrize(("text", "place"), [
    ("epoch: 3", ".epoch"), ("epochs: many", ".epochs"), ("epochs: 0", ".epochs"), ("opt: sdg", ".opt"), ("eval: 1", ".eval"),
    ("quan: {excepts: {fc: {weight: {bits: 4}}}}", ".quan.excepts"), ("target_bits: [a]", ".target_bits[]"),
    ("data_fraction: 0.0", ".data_fraction"), ("dataloader: {data_fraction: 0.0}", ".dataloader.data_fraction"),
    ("name: 1.10\nepochs:\nquan: {excepts: {fc: }, act: {all_positive: auto}}\ngpu: [0, {a: b}]\nweight_bits: [3, 4]", "")])
def test_a_json_schema_allows_what_the_schema_does(tmp_path, text, place):
    schema = json.loads((ROOT / "docs" / "schemas" / "indicators_pretraining.json").read_text())
    assert misfits(plain(decode_yaml(text.encode(), "x")), schema) == ([place] if place else [])
    if place:
        with pytest.raises(UserError):
            read(tmp_path, text)
    else:
        read(tmp_path, text)


def sections_in(hint):
    """The dataclasses that a type names, at any depth."""
    return [hint] if dataclasses.is_dataclass(hint) else [inner for arm in typing.get_args(hint) for inner in sections_in(arm)]


def without_meaning(schema):
    """The fields of a schema, and of its sections, that do not say what they mean in one plain sentence."""
    hints = typing.get_type_hints(schema)
    return [name for item in dataclasses.fields(schema)
            for name in ([] if re.fullmatch(r"[^ ].{8,}\.", item.metadata.get("help", "")) else [item.name])
            + [f"{item.name}.{inner}" for section in sections_in(hints[item.name]) for inner in without_meaning(section)]]


@pytest.mark.parametrize(("stage", "name"), [("indicators_pretraining", "IndicatorsConfig"),
                                             ("indicators_pretraining", "PruningConfig"),
                                             ("quantization_training", "FinetuneConfig")])
def test_every_key_says_what_it_means(stage, name, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"schema_of_{stage}", ROOT / stage / "schema.py")
    module = importlib.util.module_from_spec(spec)  # over this stage's layers, of which the other has equal copies
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    schema = getattr(module, name)
    assert without_meaning(schema) == []
    plain_key = dataclasses.make_dataclass("Plain", [("dataloader", DataConfig, option(DataConfig(), help="The images.")),
                                                     ("lr", float, option(1.0, low=0))])
    assert without_meaning(plain_key) == ["lr"]


def test_bounds_hold_inside_and_outside():
    @dataclasses.dataclass(frozen=True)
    class Section:
        share: float = option(0.5, above=0, high=1)

    assert build(Section, {"share": 1}, {"": "f"}).share == 1
    for value in (0, 1.01, -3):
        with pytest.raises(UserError, match="allowed is"):
            build(Section, {"share": value}, {"": "f"})
