"""The typed configuration: what it accepts, and what it says of everything else."""

import pathlib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from schema import IndicatorsConfig
from util.config import bounded, build, differing_keys, load_config, to_plain
from util.errors import UserError

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
    ("epochs: true", "epochs: expected a whole number, found True"),
    ("lr: .nan", "lr: expected a number, found nan"),
    ("eval: 'yes please'", "eval: expected true or false"),
    ("opt: sdg", "opt: expected one of sgd, momentum, adam, adamw, found 'sdg'; did you mean 'sgd'?"),
    ("dataloader: 5", "dataloader: expected a section, found 5"),
    ("target_bits: [4, 4]", "target_bits: found [4, 4], expected different bit-widths"),
    ("target_bits: [1, 4]", "target_bits: found [1, 4]"),
    ("target_bits: []", "target_bits: found []"),
    ("quan: {excepts: {conv1: {weight: {bits: 4}}}}", "quan.excepts.conv1.weight.bits: unknown key; did you mean 'bit'?"),
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
    "!!int ''", "!!float x", "!!bool x", "!!timestamp x", "0001-01-01T00:00:00+23:59", "2001-01-01", "!!set {a}",
    "!!binary eA==", "0x" + "f" * 9999, "9" * 400, "[" * 3000, "{a: " * 60, "{0x" + "f" * 9999 + ": 1}"])
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


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot read the file \(No such file"):
        load_config(IndicatorsConfig, ["nowhere.yaml"])


JUNK = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(IndicatorsConfig.__dataclass_fields__)), JUNK, max_size=6))
def test_junk_values_give_a_config_or_a_user_error(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("junk") / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    try:
        assert isinstance(load_config(IndicatorsConfig, [path]), IndicatorsConfig)
    except UserError as error:
        assert str(path) in str(error)


def test_a_config_survives_being_written_and_read(tmp_path):
    config = read(tmp_path, LIMPQ_STYLE)
    assert read(tmp_path, yaml.safe_dump(to_plain(config))) == config


def test_differing_keys_are_named_with_their_section(tmp_path):
    old, new = read(tmp_path, LIMPQ_STYLE), read(tmp_path, LIMPQ_STYLE, "dataloader.batch_size=1", "lr=0.5")
    assert differing_keys(to_plain(old), to_plain(new)) == ["dataloader.batch_size", "lr"]


@pytest.mark.parametrize("path", sorted(pathlib.Path(__file__).parents[1].glob("config_*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path):
    assert load_config(IndicatorsConfig, [path]).name


def test_bounds_hold_inside_and_outside():
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Section:
        share: float = bounded(0.5, above=0, high=1)

    from util.config import Origin

    assert build(Section, {"share": 1}, "", Origin("f", {})).share == 1
    for value in (0, 1.01, -3):
        with pytest.raises(UserError, match="allowed is"):
            build(Section, {"share": value}, "", Origin("f", {}))
