"""Pruned networks: non-zero weights, sparse sizes and effective BitOPs in budgets, report, policies and sweeps."""

import csv
import itertools
from fractions import Fraction

import pytest
import yaml
from conftest import content
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ilp import rank
from test_search import flags, found, refused, searched

import ilp
import main as yaml_main
import search
from network import LARGEST_COUNT, Row, SearchSpace
from options import SearchConfig
from study import Study

BITS = [5, 4, 2]
ZEROS = {"block.conv1": 29, "block.conv2": 461, "block.conv3": 4607, "block.conv4": 9216, "stem": 0, "head": 577}


def layer_row(params, positions, zeros=None):
    """A linear layer used at `positions` positions of an image, one more by the published count."""
    return Row("linear", [params, 1], 1, params * (positions + 1), params * positions, params, params,
               sparsity=None if zeros is None else zeros / params)


# ---------------------------------------------------------------------------------------------------------------------
# One layer.


@settings(derandomize=True, deadline=None)
@given(st.integers(1, LARGEST_COUNT), st.fractions(0, 1))
def test_the_number_of_non_zero_weights_is_exact(params, share):
    zeros = int(params * share)
    assert layer_row(params, 1, zeros).nonzero == params - zeros
    assert layer_row(params, 1).nonzero == params


def test_macs_of_non_zero_weights():
    row = layer_row(9, 7, zeros=4)
    assert (row.nonzero_macs("published"), row.nonzero_macs("exact")) == (5 * 8, 5 * 7)
    strange = Row("linear", [9, 1], 1, 8, 10**15 - 1, 9, 1, sparsity=4 / 9)
    assert (strange.nonzero_macs("published"), strange.nonzero_macs("exact")) == (4, (10**15 - 1) * 5 // 9)  # 4.44


@pytest.mark.parametrize(("zeros", "sizes"), [
    (0, [200, 400, 800]), (25, [200, 400, 700]), (50, [200, 300, 500]), (60, [180, 260, 420]), (100, [100, 100, 100])])
def test_sparse_size_is_the_smaller_of_dense_and_one_bit_per_weight_plus_the_non_zeros(zeros, sizes):
    assert [layer_row(100, 1, zeros).sparse_size(bits) for bits in (2, 4, 8)] == sizes


# ---------------------------------------------------------------------------------------------------------------------
# The policy, against every policy there is.


@st.composite
def pruned(draw):
    """(Study, {layer: non-zero weights}) of two or three searched layers and one fixed layer."""
    indicator = st.fixed_dictionaries(dict.fromkeys(BITS, st.integers(-1, 4).map(float)))
    rows, nonzero = {}, {}
    for name in ["fixed", *(f"layer{i}" for i in range(draw(st.integers(2, 3))))]:
        params = draw(st.sampled_from([2, 10, 20]))
        zeros = draw(st.integers(0, 10)) * params // 10
        rows[name], nonzero[name] = layer_row(params, draw(st.integers(1, 4)), zeros), params - zeros
    fixed = {"fixed": rows.pop("fixed")}
    layers = [ilp.Layer(name, draw(indicator), draw(indicator), row.macs_published, row.params)
              for name, row in rows.items()]
    return Study(SearchSpace("made_up", rows, fixed), BITS, layers), nonzero


budgets = st.fixed_dictionaries({}, optional={
    "cr": st.sampled_from(["5", "7.5", "9.3", "12", "16", "25"]), "bops": st.just(True),
    "size_budget": st.integers(40, 250).map(lambda bits: f"{bits / 2**23:.12f}"),
    "bops_budget": st.integers(500, 4000).map(lambda bitops: f"{bitops / 1e9:.9f}")}).filter(bool)


def policies_that_keep(config, study, nonzero):
    """Every policy inside the budgets, worked out with fractions from the numbers of non-zero weights."""
    rows = study.network.rows | study.network.fixed
    count = nonzero if config.sparse_bops else {name: row.params for name, row in rows.items()}
    macs = {name: Fraction(row.macs_published * count[name], row.params) for name, row in rows.items()}
    dense_macs = sum(row.macs_published for row in study.network.rows.values())
    pairs = list(itertools.product(BITS, BITS))
    for chosen in itertools.product(range(len(pairs)), repeat=len(study.layers)):
        bits = dict(zip(rows, [*(pairs[index] for index in chosen), (8, 8)], strict=True))
        size = sum(min(row.params * bits[name][0], row.params + nonzero[name] * bits[name][0]) if config.sparse_size
                   else row.params * bits[name][0] for name, row in rows.items())
        bitops = {name: macs[name] * w * a for name, (w, a) in bits.items()}
        if ((not config.cr or 32 * sum(row.params for row in rows.values()) >= Fraction(config.cr) * size)
                and (not config.bops or sum(bitops.values()) - bitops["fixed"] <= 9 * dense_macs)
                and (not config.size_budget or size <= Fraction(config.size_budget) * 2**23)
                and (not config.bops_budget or sum(bitops.values()) <= Fraction(config.bops_budget) * 10**9)):
            yield chosen


@settings(derandomize=True, deadline=None, max_examples=250)
@given(pruned(), budgets, st.sampled_from([(True, False), (False, True), (True, True)]))
def test_the_best_policy_under_sparse_budgets(made, budget, counted):
    study, nonzero = made
    config = SearchConfig("some.pkl", wb=3, ab=3, sparse_size=counted[0], sparse_bops=counted[1],
                          **{"cr": 0, "bops": False} | budget)
    problem = study.problem(config)
    kept = [(rank(problem, study.layers, chosen), list(chosen)) for chosen in policies_that_keep(config, study, nonzero)]
    if kept:
        solution = ilp.solve(problem)
        assert solution.chosen == min(kept)[1] and solution.proven
    else:
        with pytest.raises(ilp.Infeasible):
            ilp.solve(problem)


# ---------------------------------------------------------------------------------------------------------------------
# The commands.


def pruned_content():
    """The made-up indicators file with zeros in its layers, and so many positions that BitOPs differ in what is printed."""
    made = content()
    for name, row in (made["layers"] | made["fixed"]).items():
        row["sparsity"] = ZEROS[name] / row["params"]
        for count in ("macs_published", "macs_exact"):
            row[count] *= 1000
    return made


def without_sparsity():
    made = content()
    for row in (made["layers"] | made["fixed"]).values():
        del row["sparsity"]
    return made


@pytest.fixture
def path(save):
    return save(pruned_content())


def printed(capsys, path, words):
    search.main(["--i", path, *flags(words)])
    return capsys.readouterr().out


def run_search(capsys, path, words, tmp_path):
    """(printout, policy file)."""
    out = printed(capsys, path, f"{words} --output {tmp_path / 'policy.yaml'}")
    return out, yaml.safe_load((tmp_path / "policy.yaml").read_text())


def worked_out(policy):
    """What the pruned file adds to the cost of a policy, from its numbers of zeros."""
    rows = pruned_content()["layers"] | pruned_content()["fixed"]
    bits = dict(zip(rows, [*zip(policy["weight_bits"], policy["act_bits"], strict=True), (8, 8), (8, 8)], strict=True))
    params = {name: row["params"] for name, row in rows.items()}
    nonzero = {name: params[name] - ZEROS[name] for name in rows}
    size = sum(min(params[name] * w, params[name] + nonzero[name] * w) for name, (w, _) in bits.items())
    cost = {"sparsity": sum(ZEROS.values()) / sum(params.values()), "sparse_size_mb": size / 8 / 2**20,
            "sparse_compression_ratio": 32 * sum(params.values()) / size}
    for count in ("published", "exact"):
        uses = {name: rows[name][f"macs_{count}"] // params[name] for name in rows}
        cost[f"effective_bitops_{count}"] = sum(uses[name] * nonzero[name] * w * a for name, (w, a) in bits.items())
    return cost


@pytest.mark.parametrize("words", ["--cr 9 --wb 3 --ab 3", "--cr 17 --wb 3 --ab 3 --sparse-size",
                                   "--cr 8 --wb 1.5 --ab 1.5 --sparse-bops",
                                   "--cr 17 --wb 1.5 --ab 1.5 --sparse-size --sparse-bops"])
def test_report_and_policy_say_what_the_zeros_save(capsys, path, tmp_path, words):
    out, policy = run_search(capsys, path, words, tmp_path)
    cost = worked_out(policy)
    assert policy["cost"].items() >= cost.items()
    lines = out.splitlines()
    assert "sparsity 59.02%, 14890 of 25228 weights are zero, fixed layers included" in lines
    assert (f"sparse size {cost['sparse_size_mb']:.3f} MB, {cost['sparse_compression_ratio']:.3f} times smaller than "
            "0.096 MB at 32 bits") in lines
    for count in ("published", "exact"):
        assert (f"effective BitOPs {cost[f'effective_bitops_{count}'] / 1e9:.3f} G ({count} MACs whose weight is not zero), "
                "fixed layers included") in lines
    assert lines[-10].split() == ["layer", "w", "a", "MACs", "size", "BitOPs", "sparsity"]
    table = {line.split()[0]: line.removesuffix("  fixed").split()[-1] for line in lines[-9:-3]}
    params = {name: row["params"] for name, row in (content()["layers"] | content()["fixed"]).items()}
    assert table == {name: f"{zeros / params[name]:.2%}" for name, zeros in ZEROS.items()}


def same_but_for_names(printout):
    idle = "without effect here: {} (nothing is pruned)\n"
    printout = printout.replace(idle.format("sparse_size"), "").replace(idle.format("sparse_bops"), "")
    return printout.replace("sparse size", "size").replace("effective BitOPs", "BitOPs")


@pytest.mark.parametrize("words", ["--cr 9 --wb 3 --ab 3 --shadow --output {}/policy.yaml",
                                   "--sweep cr=7:9:0.5 --sweep-policies {}"])
def test_nothing_is_new_for_a_dense_network(capsys, save, tmp_path, words):
    """Neither where the table says that nothing is zero nor where it says nothing."""
    texts = []
    for name, made in (("said", content()), ("silent", without_sparsity())):
        out = printed(capsys, save(made, f"{name}.pkl"), words.format(tmp_path / name))
        files = sorted((tmp_path / name).iterdir())
        texts.append([out.replace(str(tmp_path / name), ""), *(file.name + file.read_text() for file in files)])
    assert texts[0] == texts[1] and len(texts[0]) > 1
    assert "spars" not in str(texts) and "effective" not in str(texts)


def test_the_flags_change_nothing_where_nothing_is_zero(capsys, save):
    path, words = save(content()), "--cr 9.5 --wb 3 --ab 3 --bops-budget 0.1 --size-budget 1 --shadow"
    dense = printed(capsys, path, words)
    counted = printed(capsys, path, f"{words} --sparse-size --sparse-bops")
    assert counted != dense == same_but_for_names(counted)


def test_zeros_leave_the_dense_budgets_alone(capsys, save, path):
    words = "--cr 9.5 --wb 3 --ab 3"
    assert found(capsys, "--i", path, *flags(words)) == found(capsys, "--i", save(content(), "dense.pkl"), *flags(words))


def constraint(printout, name):
    """(amount, limit) of a constraint as they are printed."""
    words = next(line for line in printout.splitlines() if line.startswith(f"{name} constraint: ")).split(": ")[1].split()
    return words[0], words[2]


def test_the_amounts_and_limits_that_are_printed(capsys, path, tmp_path):
    """The limit of --bops is that of the dense network; fixed layers count in the budgets of the whole network."""
    words = ("--cr 17 --bops True --wb 1.5 --ab 1.5 --size-budget 0.008 --bops-budget 10 --macs exact --sparse-size "
             "--sparse-bops")
    out, policy = run_search(capsys, path, words, tmp_path)
    given, cost = pruned_content(), worked_out(policy)
    dense = sum(row["macs_exact"] for row in given["layers"].values())
    fixed = 64 * (given["fixed"]["stem"]["macs_exact"] + 1000 * (640 - ZEROS["head"]))
    size, bitops = f"{cost['sparse_size_mb']:.6f}", cost["effective_bitops_exact"]
    full = sum(row["params"] for row in (given["layers"] | given["fixed"]).values()) * 32
    assert constraint(out, "sparse size") == (size, f"{(full // 17) / 2**23:.6f}")
    assert constraint(out, "sparse size budget") == (size, "0.008000")
    assert constraint(out, "effective BitOPs") == (f"{(bitops - fixed) / 1e9:.6f}", f"{dense * 2.25 / 1e9:.6f}")
    assert constraint(out, "effective BitOPs budget") == (f"{bitops / 1e9:.6f}", "10.000000")
    assert policy["constraints"] == {"cr": 17, "bops": True, "wb": 1.5, "ab": 1.5, "macs": "exact", "bops_budget": 10,
                                     "size_budget": 0.008, "sparse_size": True, "sparse_bops": True}


def test_each_flag_counts_for_its_own_budgets(capsys, path):
    for words, counted in (("--sparse-size", {"sparse size"}), ("--sparse-bops", {"effective BitOPs"}), ("", set())):
        out = printed(capsys, path, f"--cr 8 --wb 3 --ab 3 {words}")
        assert {line.split(" constraint: ")[0] for line in out.splitlines() if " constraint: " in line} \
            == {"size", "BitOPs"} - {name.split()[1] for name in counted} | counted


@pytest.mark.parametrize(("words", "least", "asked"), [
    ("--cr 100 --bops False --sparse-size", "(cr at most ", "--cr {} --bops False --sparse-size"),
    ("--cr 0 --wb 1 --ab 1 --sparse-bops", "(wb times ab at least ", "--cr 0 --wb {} --ab 1 --sparse-bops"),
    ("--size-budget 0.001 --sparse-size", "takes at least ", "--size-budget {} --sparse-size"),
    ("--bops-budget 1 --sparse-bops", "takes at least ", "--bops-budget {} --sparse-bops")])
def test_the_least_that_a_sparse_budget_takes_can_be_asked_for(capsys, path, words, least, asked):
    line = refused(capsys, search.main, ["--i", path, *flags(words)])
    number = line.split(least)[1].split()[0].strip("(),")
    assert found(capsys, "--i", path, *flags(asked.format(number)))
    beyond = float(number) * (1.001 if least.startswith("(cr") else 0.999)
    assert "infeasible" in refused(capsys, search.main, ["--i", path, *flags(asked.format(beyond))])


def test_shadow_prices_of_sparse_budgets(capsys, path):
    """1% more of the limit is worth what a search with that limit says."""
    words = "--bops False --sparse-size --shadow --cr"
    out = printed(capsys, path, f"{words} 17.2")
    [line] = [line for line in out.splitlines() if line.startswith("1% more ")]
    more = printed(capsys, path, f"{words} {17.2 / 1.01:.9f}")
    before, after = (float(text.split("objective ")[1].split(",")[0]) for text in (out, more))
    assert before > after
    assert line == f"1% more sparse size: the objective falls by {before - after:.9f}"


@pytest.mark.parametrize(("words", "achieved", "per_unit"), [
    ("--sweep cr=12:18:0.5 --bops False --sparse-size", "sparse_compression_ratio", 1),
    ("--sweep bops=2:5:0.5 --sparse-bops", "effective_bitops_published", 10**9)])
def test_a_sweep_of_a_sparse_budget(capsys, path, tmp_path, monkeypatch, words, achieved, per_unit):
    import plots

    drawn, frontier_figure = [], plots.frontier_figure
    monkeypatch.setattr(plots, "frontier_figure", lambda *arguments: drawn.append(arguments) or frontier_figure(*arguments))
    table, policies = tmp_path / "table.csv", tmp_path / "policies"
    printed(capsys, path, f"{words} --sweep-output {table} --sweep-policies {policies} --plot {tmp_path / 'plot.svg'}")
    rows = list(csv.DictReader(table.open()))
    kept = [row for row in rows if row["status"] == "optimal"]
    assert len({row["objective"] for row in kept}) > 2 and len(kept) < len(rows)
    for row in kept:
        with open(row["policy"]) as file:
            policy = yaml.safe_load(file)
        assert {key: float(row[key]) for key in worked_out(policy)} == worked_out(policy)
        amount = float(row[achieved]) / per_unit
        assert amount >= float(row["cr"]) if "cr" in row else amount <= float(row["bops"])
    [(points, label, *_)] = drawn
    assert [point["x"] for point in points] == [float(row[achieved]) / per_unit for row in kept]
    assert label == {1: "sparse compression ratio", 10**9: "effective BitOPs in G (published MACs)"}[per_unit]


@pytest.mark.parametrize(("made", "words"), [(pruned_content(), "--sweep cr=8:12:2"),
                                             (content(), "--sweep cr=8:9:0.5 --sparse-size --sparse-bops")])
def test_a_dense_budget_or_network_is_drawn_by_its_dense_size(capsys, save, tmp_path, monkeypatch, made, words):
    import plots

    drawn, frontier_figure = [], plots.frontier_figure
    monkeypatch.setattr(plots, "frontier_figure", lambda *arguments: drawn.append(arguments) or frontier_figure(*arguments))
    out = printed(capsys, save(made), f"{words} --plot {tmp_path / 'plot.svg'}")
    rows = list(csv.DictReader(line for line in out.splitlines() if line[0].isdecimal() or line.startswith("cr,")))
    [(points, label, *_)] = drawn
    assert label == "compression ratio"
    assert [point["x"] for point in points] == [float(row["compression_ratio"]) for row in rows if row["compression_ratio"]]


@pytest.mark.parametrize("flag", ["--sparse-size", "--sparse-bops", "--sparse-size --sweep cr=8:9:0.5"])
def test_a_table_without_sparsity_is_refused(capsys, save, tmp_path, flag):
    silent = save(without_sparsity())
    line = refused(capsys, search.main, ["--i", silent, "--cr", "9", *flags(flag), "--output", str(tmp_path / "p.yaml")])
    assert line == (f"error: {flag.split()[0]}: {silent} says nothing of sparsity; expected a layer table with a column "
                    "sparsity\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["indicators.pkl"]


def test_one_layer_that_says_what_is_zero_is_enough(capsys, save):
    made = without_sparsity()
    made["fixed"]["head"]["sparsity"] = 0.5
    out = printed(capsys, save(made), "--cr 9 --sparse-size --sparse-bops")
    assert "sparsity 1.27%, 320 of 25228 weights" in out


@pytest.mark.parametrize(("text", "expected"), [
    ("sparse_size: 3\n", "sparse_size: expected"), ("sparse_bop: true\n", "did you mean 'sparse_bops'?")])
def test_bad_yaml(capsys, tmp_path, text, expected):
    config = tmp_path / "config.yaml"
    config.write_text(f"indicators: some.pkl\n{text}")
    assert expected in refused(capsys, yaml_main.main, [str(config)])


def test_yaml_has_the_same_keys(capsys, path, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"indicators: {path}\ncr: 17\nwb: 1.5\nab: 1.5\nsparse_size: true\nsparse_bops: true\n")
    yaml_main.main([str(config)])
    out = capsys.readouterr().out
    assert out == printed(capsys, path, "--cr 17 --wb 1.5 --ab 1.5 --sparse-size --sparse-bops")
    assert "sparse size constraint" in out and searched(out)[0] != [2] * 4
