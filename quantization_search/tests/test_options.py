"""The newer flags: what they do, how they combine with LIMPQ's, and how they refuse."""

import csv
import itertools
import json
import pathlib
import subprocess
import sys

import pytest
import yaml
from conftest import STAGE, content
from test_search import flags, found, refused, searched

import main as yaml_main
import search
from network import TABLES
from options import SearchConfig

LAYERS = [f"block.conv{i}" for i in (1, 2, 3, 4)]


@pytest.fixture
def path(save):
    return save(content())


def printed(capsys, path, words):
    search.main(["--i", path, *flags(words)])
    return capsys.readouterr().out


def constraints(printout):
    return [line.split(" constraint:")[0] for line in printout.splitlines() if " constraint: " in line]


@pytest.mark.parametrize(("words", "expected"), [
    ("--cr 9", ["size", "BitOPs"]),
    ("--bops-budget 1", ["BitOPs budget"]),
    ("--bops-budget 1 --cr 9", ["size", "BitOPs budget"]),
    ("--size-budget 0.02 --bops True", ["BitOPs", "size budget"]),
    ("--avg-wb 3 --avg-ab 2.5", ["mean weight bits", "mean activation bits"]),
    ("--act-mem 0.01", ["largest activation memory"]),
    ("--act-mem 0.02 --act-mem-kind summed --bops False --cr 0", ["summed activation memory"]),
    ("--fix block.conv1=4,4 --tie block.conv2 block.conv3", ["size", "BitOPs"]),
])
def test_limpq_s_defaults_stand_until_a_newer_budget_is_given(capsys, path, words, expected):
    assert constraints(printed(capsys, path, words)) == expected


@pytest.mark.parametrize(("words", "line"), [
    ("--cr 9", ""), ("--cr 9 --wb 4", ""), ("--cr 9 --bops False --wb 4", "wb (bops is off)"),
    ("--avg-wb 3 --ab 2 --act-mem-kind summed", "ab (bops is off), act_mem_kind (no act_mem)"),
    ("--cr 9 --sparse-size", "sparse_size (nothing is pruned)"),
    ("--sweep cr=7:8:1 --cr 9", "cr (sweep)"), ("--sweep bops=0.01:0.02:0.01 --wb 2", "wb (bops is off)"),
])
def test_options_that_nothing_reads_are_named(capsys, path, words, line):
    said = [row for row in printed(capsys, path, words).splitlines() if row.startswith("without effect")]
    assert said == ([f"without effect here: {line}"] if line else [])


def test_pins_ties_and_equal_bits(capsys, path):
    weights, acts = found(capsys, "--i", path, *flags("--cr 0 --wb 3 --ab 3 --fix block.conv[12]=4,2"))
    assert weights[:2] == [4, 4] and acts[:2] == [2, 2]
    weights, acts = found(capsys, "--i", path, *flags("--cr 9.5 --tie block.conv1 block.conv4 --tie *conv2 *conv3"))
    assert (weights[0], acts[0]) == (weights[3], acts[3]) and (weights[1], acts[1]) == (weights[2], acts[2])
    weights, acts = found(capsys, "--i", path, *flags("--bops-budget 0.02 --same-bits"))
    assert weights == acts


def test_activations_at_32_bits_are_left_alone_and_the_bits_of_weights_searched_alone(capsys, save, tmp_path):
    made, output = content(), tmp_path / "policy.yaml"
    for table in made["act"].values():  # which counts for nothing
        table.clear()
    made["weight"]["module.block.conv2"]["3"] = 0.01  # erased
    rows = list(made["layers"].values())
    least = {}
    for weights in itertools.product((4, 3, 2), repeat=4):
        bits = list(zip(weights, made["weight"].items(), strict=True))
        if sum(row["macs_published"] * w * 32 for row, w in zip(rows, weights, strict=True)) > \
                sum(row["macs_published"] for row in rows) * 96 or weights[1] == 3:
            continue
        least[weights] = sum(indicators[str(w)] for w, (_, indicators) in bits)
    for more in ([], ["--plot", str(tmp_path / "policy.svg")], ["--baseline", "reversed"], ["--baseline", "random"]):
        words = flags(f"--cr 0 --bops --wb 3 --ab 32 --output {output}")
        weights, acts = found(capsys, "--i", save(made), *words, *more)
        assert acts == [32] * 4 and set(weights) <= {4, 3, 2}
        assert "--baseline" in more or tuple(weights) == min(least, key=least.get)
    assert yaml.safe_load(output.read_text())["act_bits"] == [32] * 4
    assert found(capsys, "--i", save(made), *flags("--size-budget 0.05 --ab 32 --fix *conv4=2,32"))[0][3] == 2
    for words, message in (("--same-bits", "--same-bits: is about bits of activations"), ("--avg-ab 3", "--avg-ab: is about"),
                           ("--act-mem 1", "--act-mem: is about"), ("--fix *conv4=2,4", "4 is not among the candidates 32")):
        assert message in refused(capsys, search.main, ["--i", save(made), "--ab", "32", *flags(words)])


def test_a_whole_network_budget_is_what_the_report_prints(capsys, path, tmp_path):
    output = tmp_path / "policy.yaml"
    printed(capsys, path, f"--cr 9 --wb 3 --ab 3 --output {output}")
    cost = yaml.safe_load(output.read_text())["cost"]
    for key, words in (("bitops_published", f"--bops-budget {cost['bitops_published'] / 1e9:.9f}"),
                       ("size_mb", f"--size-budget {cost['size_mb']:.17g}")):
        assert "optimal, gap 0" in printed(capsys, path, f"{words} --output {output}")
        assert yaml.safe_load(output.read_text())["cost"][key] <= cost[key]


def test_the_outlier_rules_reach_the_result(capsys, save):
    made = content()
    made["weight"]["module.block.conv1"] = {"4": 0.5, "3": 0.2, "2": 0.1}
    path = save(made)
    loose = "--cr 0 --wb 4 --ab 4 --outliers"
    assert found(capsys, "--i", path, *flags(f"{loose} erase"))[0][0] == 4
    assert found(capsys, "--i", path, *flags(f"{loose} keep"))[0][0] == 2
    assert found(capsys, "--i", path, *flags(f"{loose} isotonic"))[0][0] == 2  # all three tie; the fewest BitOPs win
    assert "and are kept as they are: block.conv1" in printed(capsys, path, f"{loose} keep")


def table(path, ms=lambda name, w, a: f"{w * a / 10}", names=LAYERS, leave_out=()):
    rows = [f"{name},{w},{a},{ms(name, w, a)}" for name in names for w in (4, 3, 2) for a in (4, 3, 2)
            if (name, w, a) not in leave_out]
    path.write_text("layer,weight_bits,act_bits,ms\n" + "\n".join(rows) + "\n")
    return str(path)


def test_latency(capsys, path, tmp_path):
    times = table(tmp_path / "times.csv")
    weights, acts = found(capsys, "--i", path, "--latency", times, "--latency-budget", "3.6")
    assert sum(w * a for w, a in zip(weights, acts, strict=True)) <= 36
    assert set(weights + acts) != {2}
    assert found(capsys, "--i", path, "--latency", times, "--latency-budget", "1.6") == [[2] * 4, [2] * 4]  # exactly
    with_fixed = tmp_path / "with_fixed.csv"
    with_fixed.write_text((tmp_path / "times.csv").read_text() + "stem,8,8,0.5\nhead,8,8,0.7\n")
    out = printed(capsys, path, f"--latency {with_fixed} --latency-budget 2.8")
    assert searched(out) == [[2] * 4, [2] * 4] and "2.800000 of 2.800000 ms" in out


def test_a_latency_table_as_spreadsheets_write_it(capsys, path, tmp_path):
    plain = pathlib.Path(table(tmp_path / "plain.csv"))
    times = tmp_path / "times.csv"
    times.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    assert found(capsys, "--i", path, "--latency", str(times), "--latency-budget", "3.6") \
        == found(capsys, "--i", path, "--latency", str(plain), "--latency-budget", "3.6")
    for data, expected in ((plain.read_text().encode("utf-16"), "UTF-16 text; save it as UTF-8"), (b"layer\xff", "line 1 is")):
        times.write_bytes(data)
        line = refused(capsys, search.main, ["--i", path, "--latency", str(times), "--latency-budget", "3"])
        assert str(times) in line and expected in line


def test_a_latency_table_needs_only_the_pairs_that_may_be_taken(capsys, path, tmp_path):
    unequal = {(name, w, a) for name in LAYERS for w in (4, 3, 2) for a in (4, 3, 2) if w != a}
    times = table(tmp_path / "times.csv", leave_out=unequal)
    found(capsys, "--i", path, *flags(f"--latency {times} --latency-budget 3.6 --same-bits"))
    assert "the row block.conv1,4,3 is missing" in refused(
        capsys, search.main, ["--i", path, *flags(f"--latency {times} --latency-budget 3.6")])


@pytest.mark.parametrize(("text", "expected"), [
    ("", "line 1: expected the header"),
    ("layer,w,a,ms\n", "line 1: expected the header"),
    ("layer;weight_bits;act_bits;ms\n", "line 1: expected the header layer,weight_bits,act_bits,ms, separated by commas"),
    ("layer,weight_bits,act_bits,ms\nblock.conv1,4,4\n", "line 2: expected a layer"),
    ("layer,weight_bits,act_bits,ms\nblock.conv1,4,4,fast\n", "line 2: ms: found 'fast'"),
    ("layer,weight_bits,act_bits,ms\nblock.conv1,4,4,nan\n", "line 2: ms: found nan"),
    ("layer,weight_bits,act_bits,ms\nblock.conv1,4,4,-1\n", "line 2: ms: found -1"),
    ("layer,weight_bits,act_bits,ms\nblock.conv9,4,4,1\n", "did you mean 'block.conv"),
    ("layer,weight_bits,act_bits,ms\nblock.conv1,4,4,1\nblock.conv1,4,4,2\n", "stands twice"),
    ("layer,weight_bits,act_bits,ms\nblock.conv1,4,4,1\n", "the row block.conv1,4,3 is missing"),
])
def test_bad_latency_tables(capsys, path, tmp_path, text, expected):
    times = tmp_path / "times.csv"
    times.write_text(text)
    line = refused(capsys, search.main, ["--i", path, "--latency", str(times), "--latency-budget", "3"])
    assert str(times) in line and expected in line


@pytest.mark.parametrize(("words", "expected"), [
    ("--bops-budget 0", "--bops-budget: found 0, allowed is above 0"),
    ("--size-budget -1", "--size-budget: found -1"),
    ("--avg-wb nan", "--avg-wb: found nan"),
    ("--act-mem-kind all --act-mem 1", "argument --act-mem-kind"),
    ("--latency-budget 3", "--latency, --latency-budget: the table and the limit"),
    ("--latency none.csv --latency-budget 3", "none.csv: cannot read the table"),
    ("--time-limit 0", "--time-limit: found 0"),
    ("--outliers drop", "argument --outliers"),
    ("--fix block.conv1", "--fix: found 'block.conv1'"),
    ("--fix block.conv1=4", "--fix: found 'block.conv1=4'"),
    ("--fix block.conv1=8,8", "8 is not among the candidates"),
    ("--fix block.konv1=4,4", "matches no layer; did you mean 'block.conv1'?"),
    ("--fix stem=4,4", "stem is held at 8 bits"),
    ("--fix block.conv1=4,4 --fix block.conv1=3,3", "block.conv1 is given [4, 4] and [3, 3]"),
    ("--fix block.conv1=4,4 --fix *1=3,3", "block.conv1 is pinned to 4,4 by block.conv1 and to 3,3 by *1"),
    ("--fix block.conv1=4,3 --same-bits", "same_bits asks for equal bits"),
    ("--tie block.conv1", "names one layer"),
    ("--tie block.conv1 other", "other matches no layer"),
    ("--tie block.conv1 block.conv2 --fix *1=4,4 --fix *2=3,3", "share their bits, but are pinned to 4,4 and to 3,3"),
    ("--plot plot.pdf", "expected a file ending in .png or .svg"),
    ("--sweep cr", "--sweep: found 'cr'"),
    ("--sweep cr=8", "expected cr=LOW:HIGH:STEP or bops=LOW:HIGH:STEP\n"),
    ("--sweep bop=1:2:3", "did you mean 'bops'?"),
    ("--sweep size=1:2:3", "--sweep: found 'size=1:2:3'"),
    ("--sweep cr=9:8:1", "the first no larger"),
    ("--sweep cr=8:9:0", "numbers above 0"),
    ("--sweep cr=8:9:x", "--sweep: found 'x'"),
    ("--sweep cr=1:2:0.0001", "more than 1000 points"),
    ("--sweep cr=8:9:1 --shadow", "--shadow: cannot be had"),
    ("--sweep-output table.csv", "--sweep-output: belongs to sweep"),
    ("--output=", "--output: found '', expected a name for the file"),
    ("--output /proc/x.yaml", "--output: /proc/x.yaml cannot be written, since /proc is no folder"),
    ("--output mine_best.pth.tar", "--output: mine_best.pth.tar ends in .pth.tar, as checkpoints do; policies end in .yaml"),
    ("--output x.png", "--output: x.png ends in .png, as plots do"),
    ("--sweep cr=8:9:1 --sweep-output policy.yaml", "--sweep-output: policy.yaml is also written by output"),
    ("--sweep cr=8:9:1 --sweep-output policy.onnx", "--sweep-output: policy.onnx ends in .onnx, as ONNX models do; tables"),
    ("--sweep cr=8:9:1 --sweep-policies indicators.pkl", "--sweep-policies: indicators.pkl is also read by this command"),
    ("--b 7 6", "--b: 7 is not in"),
    ("--sweep cr=100:101:1", "infeasible: no policy keeps size"),
    ("--avg-wb 1.5", "mean weight bits takes at least 2 bits, asked is at most 1.5 bits"),
    ("--act-mem 0.0001", "largest activation memory takes at least"),
    ("--cr 8 --bops-budget 0.001 --fix *=4,4", "with fix as given"),
])
def test_bad_flags(capsys, path, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, search.main, ["--i", path, "--output", "policy.yaml", *flags(words)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["indicators.pkl"]


def test_the_largest_compression_that_is_possible_can_be_asked_for(capsys, path):
    line = refused(capsys, search.main, ["--i", path, *flags("--cr 100 --bops False")])
    ratio = line.split("(cr at most ")[1].split(")")[0]
    assert found(capsys, "--i", path, "--cr", ratio, "--bops", "False")[0] == [2] * 4


@pytest.mark.parametrize(("words", "flag", "unit"), [
    ("--bops-budget 0.0001", "--bops-budget", "G"), ("--size-budget 0.0001", "--size-budget", "MB"),
    ("--avg-ab 0.1", "--avg-ab", "bits"), ("--act-mem 0.0001 --act-mem-kind summed", "--act-mem", "MB")])
def test_the_least_that_is_printed_can_be_asked_for(capsys, path, words, flag, unit):
    words = flags(words)
    line = refused(capsys, search.main, ["--i", path, *words]).split()
    least = line[line.index("least") + 1]
    assert line[line.index("least") + 2].rstrip(",") == unit
    words[words.index(flag) + 1] = least
    assert found(capsys, "--i", path, *words)


def test_shadow_prices(capsys, path):
    out = printed(capsys, path, "--cr 9.5 --wb 3 --ab 3 --shadow")
    falls = [line for line in out.splitlines() if line.startswith("1% more ")]
    assert [line.split(":")[0] for line in falls] == ["1% more size", "1% more BitOPs"]
    assert all("falls by" in line for line in falls)


def test_a_sweep_gives_a_table_policies_and_a_picture(capsys, path, tmp_path):
    frontier, policies, plot = tmp_path / "table.csv", tmp_path / "policies", tmp_path / "frontier.svg"
    out = printed(capsys, path, f"--sweep cr=7:20:0.5 --sweep-output {frontier} --sweep-policies {policies} --plot {plot}")
    rows = list(csv.DictReader(frontier.open()))
    assert [row["cr"] for row in rows][:3] == ["7.0", "7.5", "8.0"] and len(rows) == 27
    kept = [row for row in rows if row["status"] == "optimal"]
    assert {row["status"] for row in rows} == {"optimal", "infeasible"}
    assert all(float(row["compression_ratio"]) >= float(row["cr"]) for row in kept)
    objectives = [float(row["objective"]) for row in kept]
    assert objectives == sorted(objectives) and len(set(objectives)) > 2
    assert f"{len(kept)} of 27 points can be kept, {len(kept)} of them proven to be optimal" in out
    assert len(list(policies.iterdir())) == len(kept) and plot.read_text().lstrip().startswith("<?xml")
    middle = kept[len(kept) // 2]
    policy = yaml.safe_load(pathlib.Path(middle["policy"]).read_text())
    assert [policy["weight_bits"], policy["act_bits"]] == found(capsys, "--i", path, "--cr", middle["cr"])


def test_a_sweep_of_bitops_prints_its_table(capsys, path):
    lines = printed(capsys, path, "--sweep bops=0.005:0.02:0.005").splitlines()
    assert lines[0].startswith("bops,status,gap,objective") and [line.split(",")[0] for line in lines[1:5]] \
        == ["0.005", "0.010", "0.015", "0.020"]


def test_the_table_of_a_sweep_lies_beside_the_output(capsys, path, tmp_path):
    printed(capsys, path, f"--sweep cr=8:9:0.5 --output {tmp_path / 'result.yaml'}")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["indicators.pkl", "result_frontier.csv"]


def test_a_picture_of_the_policy(capsys, path, tmp_path):
    plot = tmp_path / "policy.png"
    printed(capsys, path, f"--cr 9 --plot {plot}")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_yaml_has_the_same_keys(capsys, path, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"indicators: {path}\nbops_budget: 0.015\ncr:\navg_wb: 3\nfix: {{'*conv1': [4, 4]}}\n"
                      "tie: [[block.conv2, block.conv3]]\noutliers: keep\nact_mem: 1\nact_mem_kind: summed\n")
    yaml_main.main([str(config)])
    out = capsys.readouterr().out
    assert constraints(out) == ["BitOPs budget", "mean weight bits", "summed activation memory"]
    weights, acts = searched(out)
    assert (weights[0], acts[0]) == (4, 4) and (weights[1], acts[1]) == (weights[2], acts[2])
    config.write_text(f"indicators: {path}\nfix: {{'*conv1': [4]}}\n")
    assert "fix: *conv1: found [4]" in refused(capsys, yaml_main.main, [str(config)])


def test_without_budgets_of_its_own_a_configuration_has_limpq_s():
    config = SearchConfig("some.pkl")
    assert (float(config.ratio), config.uniform) == (12.2, True)
    config = SearchConfig("some.pkl", avg_wb=3)
    assert (config.ratio, config.uniform) == (0, False)


def test_the_tables_in_the_repository_are_those_of_the_models(monkeypatch):
    monkeypatch.syspath_prepend(STAGE.parent / "measurements")
    import layer_tables

    assert pathlib.Path(TABLES).read_text() == layer_tables.render()


BARE = """
import sys
sys.argv = ["search.py", "--model", "resnet20", "--i", sys.argv[1], "--cr", "9"]
import search
search.main()
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "torchvision", "matplotlib", "tqdm"}))
"""


def test_a_bare_file_of_a_built_in_network_needs_no_torch(save):
    names = list(json.loads(pathlib.Path(TABLES).read_text())["networks"]["resnet20"])[1:-1]
    path = save({"layer_name": names} | {kind: {name: {"4": 0.1, "3": 0.2, "2": 0.4} for name in names}
                                         for kind in ("weight", "act")})
    done = subprocess.run([sys.executable, "-c", BARE, path], cwd=STAGE, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
