"""The commands: what they print and write, and how they refuse."""

import ast
import math
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import yaml
from conftest import STAGE, content

import main as yaml_main
import search
from options import SearchConfig
from util.errors import user_errors_on_one_line

ROOT_READS_ALL = hasattr(os, "geteuid") and os.geteuid() == 0


def searched(printout):
    """The two lists that the printout ends with."""
    weight, act = printout.strip().splitlines()[-2:]
    assert weight.startswith("searched weight bit-widths [") and act.startswith("searched act bit-widths [")
    return [ast.literal_eval(line[line.index("["):]) for line in (weight, act)]


def flags(words):
    return words.split()


def found(capsys, *arguments):
    search.main(list(arguments))
    return searched(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["limpq", "limpqp"])
def test_published_policy(reference, capsys, tmp_path, name):
    """The published indicators give the published policy. They carry no table; the one in the repository is taken."""
    published = yaml.safe_load((reference / "published_policies.yaml").read_text())[name]
    output = tmp_path / "policy.yaml"
    search.main(["--model", "resnet50", "--i", str(reference / f"importance_indicators_resnet50_{name}.pkl"),
                 *flags("--b 6 5 4 3 2 --wb 3 --ab 4 --cr 12.2 --bops True --output"), str(output)])
    printout = capsys.readouterr().out
    assert searched(printout) == [published["weight_bits"], published["act_bits"]]
    assert "optimal, gap 0" in printout
    policy = yaml.safe_load(output.read_text())
    objective, penalty, bitops, constrained = {"limpq": (4.617439227, 0, 56.035, "48.283189 of 48.284566 G"),
                                               "limpqp": (13.374255771, 10, 56.031, "48.284566 G")}[name]
    assert (round(policy["objective"], 9), policy["penalty"]) == (objective, penalty)
    assert round(policy["cost"]["bitops_published"] / 1e9, 3) == bitops and f"BitOPs {bitops} G" in printout
    assert constrained in printout
    if name == "limpqp":
        assert "97 of 260 weight indicators are not positive" in printout


def test_the_command_prints_and_writes_its_policy(save, tmp_path):
    output = tmp_path / "new" / "policy.yaml"
    words = ["--i", save(content()), *flags("--b 4 3 2 --wb 3 --ab 3 --cr 9.5 --bops yes --output"), str(output)]
    done = subprocess.run([sys.executable, "search.py", *words], cwd=STAGE, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    policy = yaml.safe_load(output.read_text())
    assert searched(done.stdout) == [policy["weight_bits"], policy["act_bits"]]
    assert policy["arch"] == "made_up" and policy["layer_name"] == [f"block.conv{i}" for i in (1, 2, 3, 4)]
    assert policy["candidates"] == [4, 3, 2] and policy["alpha"] == 2 and policy["optimal"] is True
    assert policy["act_signed"] == [False] * 4
    assert policy["constraints"] == {"cr": 9.5, "bops": True, "wb": 3, "ab": 3, "macs": "published"}
    check_costs(policy)
    for name in (*policy["layer_name"], "stem", "head"):
        assert any(line.startswith(f"{name} ") for line in done.stdout.splitlines())
    assert "torch" not in subprocess.run([sys.executable, "-X", "importtime", "search.py", *words], cwd=STAGE,
                                         capture_output=True, text=True).stderr


def check_costs(policy):
    """Work size, BitOPs and objective out again from the file that went in."""
    given = content()
    rows = list(given["layers"].values())
    fixed = list(given["fixed"].values())
    pairs = list(zip(policy["weight_bits"], policy["act_bits"], strict=True))
    size = sum(row["params"] * w for row, (w, _) in zip(rows, pairs, strict=True)) + 8 * sum(r["params"] for r in fixed)
    assert policy["cost"]["size_mb"] == size / 8 / 2**20
    full = 32 * sum(row["params"] for row in rows + fixed)
    assert policy["cost"]["compression_ratio"] == pytest.approx(full / size) and full / size >= 9.5
    for count in ("published", "exact"):
        inside = sum(row[f"macs_{count}"] * w * a for row, (w, a) in zip(rows, pairs, strict=True))
        assert policy["cost"][f"bitops_{count}"] == inside + 64 * sum(row[f"macs_{count}"] for row in fixed)
    terms = [given["act"][f"module.{name}"][str(a)] + 2 * given["weight"][f"module.{name}"][str(w)]
             for name, (w, a) in zip(policy["layer_name"], pairs, strict=True)]
    assert policy["objective"] == pytest.approx(math.fsum(terms), rel=1e-15)


@pytest.mark.parametrize(("trained", "line"), [
    ({"dataset": "digits", "epochs": 3}, "indicators made with dataset digits, epochs 3"),
    ({"dataset": "two\nlines", 7: 1}, "indicators made with dataset 'two\\nlines'"),
    ({"two words": 1}, None), ("digits", None), ({}, None)])
def test_what_the_indicators_were_trained_on_is_said_on_one_line(save, capsys, trained, line):
    search.main(["--i", save({**content(), "trained": trained}), *flags("--b 4 3 2 --wb 3 --ab 3 --cr 9.5 --bops yes")])
    lines = capsys.readouterr().out.splitlines()
    assert [found for found in lines if "indicators made with" in found] == ([line] if line else [])


def test_candidates_in_any_order_give_the_same_policy(save, capsys):
    path = save(content())
    policies = [found(capsys, "--i", path, "--wb", "3", "--ab", "3", "--cr", "9", "--b", *bits.split())
               for bits in ("4 3 2", "2 3 4", "3 4 2")]
    assert policies[0] == policies[1] == policies[2]
    assert set(policies[0][0] + policies[0][1]) > {2}  # a budget that leaves something to decide


def test_a_gap_in_the_candidates_compares_neighbours_in_the_list(save, capsys):
    made = content()
    made["weight"]["module.block.conv1"] = {"4": 0.3, "3": 0.2, "2": 0.45}  # 3 is smaller than 4; 2 is not
    search.main(["--i", save(made), "--b", "4", "2", "--cr", "0", "--wb", "3"])
    assert "are smaller than with more bits" not in capsys.readouterr().out
    search.main(["--i", save(made), "--b", "4", "3", "2", "--cr", "0", "--wb", "3"])
    assert "1 of 12 weight indicators are smaller than with more bits" in capsys.readouterr().out


def test_each_constraint_can_be_turned_off(save, capsys):
    path = save(content())
    assert found(capsys, "--i", path, "--cr", "0", "--wb", "4", "--ab", "4") == [[4] * 4, [4] * 4]
    weights, acts = found(capsys, "--i", path, "--cr", "9.5", "--bops", "False")
    assert acts == [4] * 4 and min(weights) < 4


def test_the_exact_count_of_macs_is_used_when_asked(save, capsys):
    path, outputs = save(content()), []
    for count in ("published", "exact"):
        search.main(["--i", path, "--cr", "0", "--macs", count])
        outputs.append(capsys.readouterr().out)
    bounds = [next(line for line in text.splitlines() if line.startswith("BitOPs constraint")) for text in outputs]
    assert bounds[0] != bounds[1]


def test_non_positive_indicators_are_reported_before_the_policy(save, capsys):
    made = content()
    made["act"]["module.block.conv2"] = {"4": -0.1, "3": 0.0, "2": 0.2}
    search.main(["--i", save(made), "--cr", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "warning: 2 of 12 act indicators are not positive: block.conv2"


def test_yaml_gives_the_same_search(save, capsys, tmp_path, monkeypatch):
    path = save(content())
    expected = found(capsys, "--i", path, "--wb", "2.5", "--ab", "3", "--cr", "9.1")
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text("indicators: indicators.pkl\nwb: 2.5\nab: 2\ncr: 9.1\nbops: true\noutput: policy.yaml\n")
    yaml_main.main([str(config), "ab=3"])
    assert searched(capsys.readouterr().out) == expected
    assert yaml.safe_load((tmp_path / "policy.yaml").read_text())["weight_bits"] == expected[0]


@pytest.mark.parametrize("name", ["config_resnet50.yaml", "config_resnet20_digits.yaml"])
def test_the_configurations_of_the_repository_can_be_read(name):
    from util.config import load_config

    assert load_config(SearchConfig, [str(STAGE / name)]).bops is True


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(capsys, run, arguments):
    """The one line on stderr of a run that ends with status 2 and no policy."""
    with pytest.raises(SystemExit) as caught, user_errors_on_one_line():
        run(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and "searched" not in out
    assert err.count("\n") == 1 and err.startswith("error: ")
    return err


@pytest.mark.parametrize(("words", "expected"), [
    ("--cr 0 --bops False", "--cr, --bops: both constraints are off"),
    ("--cr -3", "--cr: found -3"),
    ("--cr nan", "--cr: found nan"),
    ("--cr inf", "--cr: found inf"),
    ("--cr 1e999999999", "--cr: found 1e999999999"),
    ("--cr twelve", "--cr: found 'twelve'"),
    ("--wb 0", "--wb: found 0"),
    ("--ab -1", "--ab: found -1"),
    ("--alpha -2", "--alpha: found -2"),
    ("--alpha 1e-999999999", "--alpha: found 1e-999999999"),
    ("--bops maybe", "argument --bops"),
    ("--b 4 4 3", "--b: found [4, 4, 3]"),
    ("--b 9 4", "--b: found [9, 4]"),
    ("--b 4 x", "argument --b"),
    ("--b 6 4 3", "6 is not in"),
    ("--macs other", "argument --macs"),
    ("--solver HIGS", "PuLP finds"),
    ("--frobnicate 1", "unrecognized arguments: --frobnicate"),
    ("--model resnet50", "but the indicators in"),
    ("--cr 100", "infeasible: no policy keeps size; size takes at least"),
    ("--cr 0 --wb 1 --ab 1.5", "infeasible: no policy keeps BitOPs; BitOPs takes at least"),
    ("--cr 100 --wb 1 --ab 1", "no policy keeps size and BitOPs"),
])
def test_bad_flags(save, capsys, tmp_path, words, expected):
    output = tmp_path / "policy.yaml"
    assert expected in refused(capsys, search.main, ["--i", save(content()), "--output", str(output), *flags(words)])
    assert [path.name for path in tmp_path.iterdir()] == ["indicators.pkl"]


def test_the_smallest_budget_that_is_printed_can_be_asked_for(save, capsys):
    path = save(content())
    line = refused(capsys, search.main, ["--i", path, "--cr", "0", "--wb", "1", "--ab", "1"])
    words = line.split()
    least = float(words[words.index("least") + 1]) * 1e9
    uniform = least / sum(row["macs_published"] for row in content()["layers"].values())
    assert found(capsys, "--i", path, "--cr", "0", "--wb", f"{uniform:.9f}", "--ab", "1") == [[2] * 4, [2] * 4]


def edited(*keys, value):
    """The made-up file with one entry replaced, or removed where the value is None."""
    made = content()
    inner = made
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return made


CONV1 = ("layers", "block.conv1")
BAD_FILES = {
    "not a pickle": (b"importance: high\n", "not an indicators file"),
    "empty": (b"", "not an indicators file"),
    "truncated": (pickle.dumps(content())[:-40], "not an indicators file"),
    "a checkpoint": (b"PK\5\6" + bytes(18), "is a checkpoint, not an indicators file; in indicators_pretraining"),
    "a policy": (b"arch: resnet20\nlayer_name: [a]\nweight_bits: [3]\n", "is a policy, not an indicators file"),
    "other content": ([1, 2, 3], "not an indicators file"),
    "NaN": (edited("weight", "module.block.conv2", "3", value=math.nan), "weight: block.conv2: the indicator at 3"),
    "infinite": (edited("act", "module.block.conv2", "3", value=-math.inf), "act: block.conv2: the indicator at 3"),
    "text for a number": (edited("act", "module.block.conv2", "3", value="1"), "act: block.conv2"),
    "huge number": (edited("act", "module.block.conv2", "3", value=10**9999), "not an indicators file"),
    "missing bits": (edited("act", "module.block.conv2", "3", value=None), "act: block.conv2 has 4 2"),
    "missing layer": (edited("act", "module.block.conv2", value=None), "no indicators for the layer block.conv2"),
    "bad arch": (edited("arch", value=7), "arch: found 7"),
    "table not a dict": (edited("layers", value=[]), "layers: expected a table"),
    "row not a dict": (edited(*CONV1, value=3), "block.conv1: expected a row"),
    "missing column": (edited(*CONV1, "params", value=None), "block.conv1: params is missing"),
    "unknown column": (edited(*CONV1, "macs", value=1), "'macs' is not a column"),
    "zero count": (edited(*CONV1, "macs_exact", value=0), "macs_exact: found 0"),
    "boolean count": (edited(*CONV1, "groups", value=True), "groups: found True"),
    "fractional count": (edited(*CONV1, "macs_published", value=1.5), "macs_published: found 1.5"),
    "unknown arch without a table": (edited("layers", value=None), "indicators.pkl: arch: 'made_up' is not a known network"),
    "huge count": (edited(*CONV1, "act_elements", value=10**9999), "not an indicators file (a number of 33216 bits)"),
    "bad kind": (edited(*CONV1, "kind", value="pool"), "kind: found 'pool'"),
    "bad shape": (edited(*CONV1, "shape", value=[8, -4, 3, 3]), "shape: found -4"),
    "shape without rank": (edited(*CONV1, "shape", value=[]), "shape: found []"),
    "shape and params": (edited(*CONV1, "params", value=5), "params: found 5, but the shape [8, 4, 3, 3] has 288"),
    "bad signed": (edited(*CONV1, "signed", value=1), "signed: found 1"),
    "bad sparsity": (edited(*CONV1, "sparsity", value=2), "sparsity: found 2"),
    "layer not in the table": (edited(*CONV1, value=None), "block.conv1 is not a layer of made_up; did you mean"),
    "layer without indicators": (edited("layers", "block.conv9", value=content()["fixed"]["stem"]),
                                 "block.conv9 has no indicators"),
    "searched and fixed": (edited("fixed", "block.conv1", value=content()["fixed"]["stem"]), "among the searched"),
    "bad fixed": (edited("fixed", value=[1]), "fixed: expected a table"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_indicator_files(save, capsys, tmp_path, case):
    value, expected = BAD_FILES[case]
    path = save(value)
    line = refused(capsys, search.main, ["--i", path, "--b", "4", "3", "2", "--output", str(tmp_path / "policy.yaml")])
    assert path in line and expected in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["indicators.pkl"]


def test_a_hostile_pickle_is_refused_and_nothing_run(save, capsys, tmp_path):
    trap = tmp_path / "trap"
    path = save(pickle.dumps(Evil(str(trap))))
    assert "it refers to" in refused(capsys, search.main, ["--i", path])
    assert not trap.exists()


def test_layers_of_another_network_are_refused_with_the_nearest_name(save, capsys):
    made = content()
    for key in ("layers", "fixed", "arch"):
        del made[key]
    made["layer_name"][0] = "module.layer1.0.conv9"
    for kind in ("weight", "act"):
        made[kind]["module.layer1.0.conv9"] = made[kind].pop("module.block.conv1")
    assert "did you mean 'layer1.0.conv" in refused(capsys, search.main, ["--i", save(made)])


def test_missing_files_and_output_that_cannot_be_written(save, capsys, tmp_path):
    path = save(content())
    assert "cannot read" in refused(capsys, search.main, ["--i", str(tmp_path / "none.pkl")])
    assert "is a folder; name a file" in refused(capsys, search.main, ["--i", path, "--output", str(tmp_path)])
    assert "cannot be written" in refused(capsys, search.main, ["--i", path, "--output", f"{path}/policy.yaml"])
    assert "is also read by this command" in refused(capsys, search.main, ["--i", path, "--output", path])
    assert "--i" in refused(capsys, search.main, [])


@pytest.mark.skipif(ROOT_READS_ALL, reason="the superuser may write everywhere")
def test_a_folder_without_write_permission(save, capsys, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    assert "cannot be written" in refused(capsys, search.main, ["--i", save(content()), "--output", f"{folder}/p.yaml"])


@pytest.mark.parametrize(("text", "expected"), [
    ("crr: 3\n", "crr: unknown key; did you mean 'cr'?"),
    ("cr: -1\n", "cr: found -1"),
    ("cr: .nan\n", "cr: expected a number"),
    ("macs: both\n", "macs: expected"),
    ("cr: 0\nbops: false\n", "both constraints are off"),
    ("bits: [4, 4]\n", "bits: found [4, 4]"),
    ("- 1\n", "expected 'key: value' lines"),
])
def test_bad_yaml(capsys, tmp_path, text, expected):
    config = tmp_path / "config.yaml"
    config.write_text(text if text.startswith("-") else "indicators: indicators.pkl\n" + text)
    line = refused(capsys, yaml_main.main, [str(config)])
    assert str(config) in line and expected in line


def test_yaml_without_indicators(capsys, tmp_path):
    config = pathlib.Path(tmp_path / "config.yaml")
    config.write_text("cr: 9\n")
    assert "indicators: the .pkl file" in refused(capsys, yaml_main.main, [str(config)])
    assert "a configuration file is needed" in refused(capsys, yaml_main.main, ["cr=9"])
    assert f"output: {config} is also read by this command" in refused(
        capsys, yaml_main.main, [str(config), "indicators=none.pkl", f"output={config}"])
