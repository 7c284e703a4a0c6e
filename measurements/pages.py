"""Puts what was measured into the pages: every table, and every figure in a sentence, from the CSV file that the
measuring command wrote.

python -m measurements.pages        after a command has written another CSV; tests/test_readme.py fails until then

A table is found by its first line, a figure by the words around it. Words without a place are an error, so a sentence that
goes takes its line here with it.
"""

import csv
import pickle
import re
import statistics

import demo

ROOT = demo.ROOT
INDICATORS = ROOT / "quantization_search" / "indicators"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), INDICATORS / "README.md"]
FIGURE = r"[−\d][\d.,]*(?: ± [\d.]+)?"
METHODS = {"rewinding": "rewinding", "iterative": "iterative", "one_shot": "one shot"}
ON_DIGITS = {"vit_tiny_patch4_32_digits": "small ViT, 16x16 images", "mobilenet_v2_digits": "MobileNetV2, 32x32 images",
             "mobilenet_v2_digits_quan_act_all_positive_true":
                 "MobileNetV2, all inputs unsigned (`quan.act.all_positive=true`)"}
SHIPPED = {"resnet50": "resnet50", "resnet18": "resnet18", "resnet20": "resnet20_fashion_mnist"}
OURS = {"compiled": "", "not compiled": "quantizer without a compiler", "float32": "", "bfloat16": "the same in bfloat16"}


def rows(name):
    """The rows of a CSV file, named as in the repository."""
    return list(csv.DictReader((ROOT / name).read_text(encoding="utf-8").splitlines()))


def row(name, /, **where):
    [found] = [line for line in rows(name) if all(line[key] == value for key, value in where.items())]
    return found


def noted(name):
    return float(row("measurements/figures.csv", name=name)["value"])


def number(line, key, digits=2, times=1):
    return f"{times * float(line[key]):.{digits}f}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables.


def markdown(columns, lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, *lines]).replace(
        "\n", "\n|" + "---|" * len(columns) + "\n", 1)


def two_digits(value, unit):
    """'0.027 s', '1.4x', '13x'; '' for what was not measured."""
    if value == "":
        return ""
    return f"{float(value):#.2g}".removesuffix(".") + unit if float(value) < 99.5 else f"{float(value):.0f}{unit}"


def search_table(found):
    """quantization_search/bench.py"""
    own = {"proven": "", "HiGHS's word": ", ties not compared"}
    lines = []
    for line in found:
        case = line["case"].removeprefix("importance_indicators_").removesuffix(".pkl")
        plain = [two_digits(line[f"{name}_over_ours"], "x") + f", {line[f'plain_{name}']}".removeprefix(", the same objective")
                 if line[f"plain_{name}"] else "not run" for name in ("highs", "cbc")]
        lines.append([case, line["layers"], line["candidates"], two_digits(line["whole_command_s"], " s"),
                      two_digits(line["solving_s"], " s") + own.get(line["ours"], f", {line['ours']}"), *plain])
    return markdown(["case", "layers", "candidates", "whole command", "solving", "plain HiGHS", "plain CBC"], lines)


def training_table(found):
    """indicators_pretraining/bench.py; the floor of the quantizer is no network."""
    keys = [f"{what}_over_{side}" for what in ("time", "memory") for side in ("chain", "floor")]
    lines = []
    for line in found:
        if line["case"] in ("quantizer", "joint step", "fine-tuning step") and line["side"] in OURS:
            shown = keys if line["case"] != "quantizer" else [key if "chain" in key else "" for key in keys]
            lines.append([OURS[line["side"]] or f"{line['case']}, {line['what']}",
                          *(number(line, key) if key else "" for key in shown)])
    return markdown(["work", "time over the plain chain", "time over no quantizers", "memory over the plain chain",
                     "memory over no quantizers"], lines)


def policies_table(found):
    """experiments/policies.yaml"""
    budgets, policies = (list(dict.fromkeys(line[key] for line in found)) for key in ("budget", "policy"))
    reached = {(line["policy"], line["budget"]): spread(line) for line in found}
    return markdown(["policy", *budgets], [[policy, *(reached.get((policy, budget), "") for budget in budgets)]
                                           for policy in policies])


def pruning_table(found):
    """measurements/pruning_on_fashion_mnist.py"""
    by_level = {}
    for line in found:
        by_level.setdefault(line["level"], {})[line["method"]] = line
    lines = []
    for reached in by_level.values():
        any_of = reached["rewinding"]
        lines.append([f"{number(any_of, 'sparsity', 1, 100)} %", f"{number(any_of, 'ratio', 1)}x",
                      *(spread(reached[method]) for method in METHODS)])
    return markdown(["weights that are zero", "smaller at 32 bits", *METHODS.values()], lines)


def digits_table(found):
    """measurements/networks_on_digits.sh"""
    lines = []
    for networks, title in ON_DIGITS.items():
        cells = {line["run"].rpartition("_")[2]: line for line in found if line["networks"] == networks}
        cells.setdefault("dense", next(line for line in found if line["run"] == "mobilenet_v2_digits_dense"))
        lines.append([title, f"{number(cells['dense'], 'top1')} %", *(
            f"{number(cells[kind], 'top1')} %, {number(cells[kind], 'times_smaller', 1)}x"
            for kind in ("uniform4", "searched4", "uniform3", "searched3"))])
    return markdown(["network", "dense, 32 bits", "uniform W4A4", "searched W4A4", "uniform W3A3", "searched W3A3"], lines)


def shipped_table(found):
    """Top-1 of the networks whose indicators lie in the repository, and what these indicators are like."""
    lines = []
    for network, name in SHIPPED.items():
        shown = read_indicators(name)
        by_bit = [steps for kind in ("weight", "act") for steps in shown[kind].values()]
        total = sum(map(len, by_bit))
        smaller = sum(steps[str(bit)] < steps[str(bit + 1)] for steps in by_bit for bit in range(2, 6))
        bad = sum(step <= 0 for steps in by_bit for step in steps.values())
        lines.append([network.replace("resnet", "ResNet-"), *(line["top1"] for line in found if line["network"] == network),
                      f"{smaller or 'none'} of {total}", str(bad or "none")])
    return markdown(["network", "dense", "6 bits", *"5432", "indicators smaller than with one bit more", "not positive"],
                    lines)


def read_indicators(name):
    return pickle.loads((INDICATORS / f"importance_indicators_{name}.pkl").read_bytes())


def tables():
    return [demo.table(rows("measurements/demo.csv")), demo.pruned_table(rows("measurements/demo_pruned.csv")),
            policies_table(rows("experiments/policies.csv")),
            search_table(rows("measurements/bench_search_2_cores.csv")),
            training_table(rows("measurements/bench_training_2_cores.csv")),
            pruning_table(rows("measurements/pruning_on_fashion_mnist.csv")),
            digits_table(rows("measurements/networks_on_digits.csv")),
            shipped_table(rows("measurements/shipped_indicators.csv"))]


# ---------------------------------------------------------------------------------------------------------------------
# Figures in sentences.


def signed(mean, digits=2):
    """With a proper minus sign, and none before a zero."""
    return f"{round(mean, digits) + 0.0:.{digits}f}".replace("-", "−")


def spread(line, key="top1", sign=1):
    """'92.91 ± 0.22' of a row of an experiment."""
    return f"{signed(sign * float(line[key]))} ± {number(line, key + '_sd')}"


def of_policies(experiment, policy, *budgets, sign=1):
    """Differences to the searched policy at each budget."""
    found = [row(f"experiments/{experiment}.csv", budget=budget, policy=policy) for budget in budgets]
    return [spread(line, "difference", sign) for line in found]


def regret(policy, budget, experiment="policies", digits=1):
    """By how many percent a policy costs more than the searched one, in the objective of the search."""
    return number(row(f"experiments/{experiment}_agreement.csv", budget=budget, policy=policy), "regret", digits, 100)


def benched(column, case, what, side):
    return number(row("measurements/bench_training_2_cores.csv", case=case, what=what, side=side), column)


def mean_and_deviation(run, precision):
    """Over seeds, of the mean over bit-widths."""
    by_seed = {}
    for line in rows("measurements/bfloat16_on_digits.csv"):
        if (line["run"], line["precision"]) == (run, precision):
            by_seed.setdefault(line["seed"], []).append(float(line["top1"]))
    means = list(map(statistics.fmean, by_seed.values()))
    return f"{statistics.fmean(means):.2f} ± {statistics.stdev(means):.2f}"


def rank_correlation(one, other):
    """Spearman's, without ties."""
    return statistics.correlation(*([sorted(values).index(value) for value in values] for values in (one, other)))


def steps_at_three_bits(kind):
    steps = [by_bit["3"] for by_bit in read_indicators(SHIPPED["resnet20"])[kind].values()]
    return f"{min(steps):.2f}", f"{max(steps):.2f}"


def figures():
    """(words with {} where a figure stands, the figures)"""
    yield from of_the_demo()
    yield from of_the_bench()
    yield from of_resnet20()
    yield from of_the_transformer()
    yield from of_other_questions()
    yield from of_digits()
    yield from of_tests()


def of_the_demo():
    dense, uniform, searched = rows("measurements/demo.csv")
    packed = noted("demo packed")
    yield "`make demo` took {} seconds", f"{noted('demo'):.0f}"
    yield "w3a3.safetensors, {} bytes ({} MB)", f"{packed:,.0f}", f"{packed / 2**20:.4f}"
    yield "{} of them are the weights", f"{float(searched['size_mb']) * 2**20:,.0f}"
    yield "`make demo-pruned` took {} seconds", f"{noted('demo pruned'):.0f}"
    yield "They took {} seconds", f"{noted('own network'):.0f}"
    yield "ended at {} % top-1", f"{noted('own network searched'):.2f}"
    yield "bits, {} times smaller than the dense network, which has {} %", f"{noted('own network smaller'):.1f}", \
        f"{noted('own network dense'):.2f}"


def of_the_bench():
    joint = "joint step", "ResNet-18, batch 16 at 128x128, bits 6 5 4 3 2"
    tuned = "fine-tuning step", "ResNet-50, batch 8 at 224x224, W4A4"
    yield "in bfloat16 takes {} of its time in float32 for the joint step and {} for", *(
        benched("time_over_floor", *case, "floor, bfloat16") for case in (joint, tuned))
    small = [float(benched("time_over_floor", "scaling, batch", size, "float32")) for size in ("1", "4")]
    yield "shows: {}x to {}x the time of the passes", f"{min(small):.1f}", f"{max(small):.1f}"
    yield "images, {}x at batch 64", benched("time_over_floor", "scaling, batch", "64", "float32")
    images = row("measurements/bench_training_2_cores.csv", case="augmentation")["note"].partition(" ")[0].replace(",", "")
    yield "augmented at {} a second", f"{float(f'{float(images):.2g}'):,.0f}"
    yield "takes {}x the time without quantizers instead of {}x", \
        benched("time_over_floor", "joint step, compiled", joint[1], "float32, compile: true"), \
        benched("time_over_floor", *joint, "float32")


def of_resnet20():
    yield "16 epochs ({} % top-1", row("measurements/shipped_indicators.csv", network="resnet20", bits="dense")["top1"]
    all_means = [float(line["top1"]) for line in rows("experiments/policies.csv") if line["budget"] == "W4A4"]
    smaller = [number(row("experiments/policies.csv", budget="W3A3", policy=policy), "ratio", 1)
               for policy in ("searched", "uniform")]
    yield "in every seed, by {} points, and {} times", *of_policies("policies", "uniform", "W3A3", sign=-1), smaller[0]
    yield "than 32 bits instead of {};", smaller[1]
    yield "random ones by {} there and by {} at W2.5A2.5", *of_policies("policies", "random", "W3A3", "W2.5A2.5", sign=-1)
    yield "no budget: {}, {} and {} points", *of_policies("policies", "reversed", "W2.5A2.5", "W3A3", "W4A4", sign=-1)
    yield "policies lie within {} points", f"{max(all_means) - min(all_means):.2f}"
    yield "bits {} to {} against {} to {})", *steps_at_three_bits("weight"), *steps_at_three_bits("act")
    yield "costs {} % more than the searched one at W3A3, uniform bits {} %, a random policy {} %", *(
        regret(policy, "W3A3") for policy in ("reversed", "uniform", "random"))
    yield "cost {} to {} % more by", *(regret("reversed", budget, "order", 0) for budget in ("W2.5A2.5", "W3A3"))
    yield "searched ones: {} points at W2.5A2.5, {} at W3A3", *of_policies("order", "reversed", "W2.5A2.5", "W3A3")
    yield "no worse either: {} points", *of_policies("order", "uniform", "W3A3")
    yield "uneven, stay {} and {} behind", *of_policies("order", "random", "W2.5A2.5", "W3A3", sign=-1)
    yield from of_losses()
    ranks = row("experiments/policies_agreement.csv", budget="W3A3", policy="sensitivity")
    yield "step sizes do ({} for weights, {} for", number(ranks, "weight_rank"), number(ranks, "act_rank")
    yield "from them, {} % and {} % from the best", *(regret("sensitivity", budget) for budget in ("W2.5A2.5", "W3A3"))
    learned = row("experiments/policies_order.csv", **{"from": "joint training"})
    yield "None of the {} learned", number(learned, "indicators", 0)


def of_losses():
    measured = rows("measurements/losses_and_batchnorm.csv")
    columns = {key: [float(line[key]) for line in measured] for key in ("moved", "held", "re-estimated", "loss")}
    yield "over {} random policies of ResNet-20 on 8x8", str(len(measured))
    yield "rank correlation of {}, {} and {} with", *(f"{rank_correlation(columns[way], columns['loss']):.2f}"
                                                       for way in ("moved", "held", "re-estimated"))
    yield "standard error of about {}", f"{(len(measured) - 1) ** -0.5:.2f}"
    line = row("experiments/policies_agreement.csv", budget="W3A3", policy="loss")
    yield "over the layers is {} for weights and {} for activations", spread(line, "weight_rank"), spread(line, "act_rank")
    yield "by losses ends {}, {} and {} points behind", *of_policies("policies", "loss", "W2.5A2.5", "W3A3", "W4A4", sign=-1)
    yield "own reverse is {} and {} points behind", *of_policies("order", "loss_reversed", "W2.5A2.5", "W3A3", sign=-1)


def of_the_transformer():
    weights = float(row("measurements/networks.csv", network="vit_tiny_patch4_32")["weights"])
    yield "(six blocks, {} M weights", f"{weights / 1e6:.1f}"
    yield "uniform bits by {} points and of random ones by {}, and {} behind reversed", \
        *of_policies("vit", "uniform", "W3A3", sign=-1), *of_policies("vit", "random", "W3A3", sign=-1), \
        *of_policies("vit", "reversed", "W3A3")
    yield "in every seed: by {} points", *of_policies("vit", "loss", "W2.5A2.5")
    yield "level with the searched ones ({});", *of_policies("vit", "reversed", "W2.5A2.5")
    yield "at W4A4 {} points behind", *of_policies("vit", "loss", "W4A4", sign=-1)
    used, allowed = (float(row("experiments/vit.csv", budget="W4A4", policy=policy)["gbitops"])
                     for policy in ("loss", "uniform"))
    yield "left {} % of the BitOPs unused", f"{100 * (1 - used / allowed):.0f}"


def of_other_questions():
    ranks = row("experiments/separate_agreement.csv", training="separate")
    yield "learned together do ({} and {})", number(ranks, "weight_rank"), number(ranks, "act_rank")
    yield "the same accuracy ({} points)", spread(row("experiments/separate.csv", training="separate"), "difference", -1)
    less = row("experiments/amount_agreement.csv", amount="3 epochs on 10 %")
    yield "give {} % of the activation bits", number(less, "same_act_bits", 0, 100)
    parts = {line["change"] or line["choice"]: line for line in rows("experiments/parts.csv")}
    yield "ones costs {} points", spread(parts["from_dense_weights"], "difference", -1)
    yield "the default ({}, {}, {}, {})", *(spread(parts[name], "difference")
                                            for name in ("shared_batchnorm", "no_random_pass", "three_sigma", "alpha_4"))
    for words, more, budget in (("size of W3A3, {}, {} and {} times", "for {}, {} and {} % top-1 instead of {} %", "W3A3"),
                                ("at W4A4, {}, {} and {} times", "for {}, {} and {} % instead of {} %", "W4A4")):
        dense, *sparse = (row("experiments/pruning.csv", budget=budget, level=level) for level in "0123")
        yield words, *(number(line, "sparse_ratio", 0) for line in sparse)
        yield more, *(number(line, "top1") for line in (*sparse, dense))
    first = row("measurements/pruning_on_fashion_mnist.csv", method="one_shot", level="1")
    yield "one shot at {} % are the same run", number(first, "sparsity", 1, 100)
    low, high = (float(row("experiments/hyperparameters_joint_lr.csv", lr=rate)["top1"]) for rate in ("0.003", "0.01"))
    yield "and 0.01 differ by {} points", f"{low - high:.2f}"


def of_digits():
    runs = "joint training", "fine-tuning W3A3"
    for words, run in zip(("reaches {} % against {} %", "at W3A3 {} % against {} %"), runs, strict=True):
        yield words, mean_and_deviation(run, "bf16"), mean_and_deviation(run, "fp32")


def of_tests():
    """What make test and make soak do is a setting of theirs."""
    def setting(name, pattern):
        [found] = re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"))
        return f"{int(found):,}"

    yield "at random moments, {} times in all", setting("tests/test_kills.py", r'"LIMPQP_KILLS", "(\d+)"')
    yield "it changes {} files", setting("indicators_pretraining/tests/fuzzing.py", r"USUAL = (\d+)")
    yield "more of both ({} kills, {} files)", *(setting("Makefile", rf"LIMPQP_{name}=(\d+)") for name in ("KILLS", "FUZZ"))
    yield "trains {} epochs in pieces", setting("Makefile", r"LIMPQP_EPOCHS=(\d+)")


# ---------------------------------------------------------------------------------------------------------------------
# Into the pages.


def pattern_of(words):
    """Words as they stand in a page: broken into lines anywhere, a figure for each {}."""
    return re.compile(r"\s+".join(re.escape(word).replace(r"\{\}", f"({FIGURE})") for word in words.split()))


def pattern_of_table(table):
    """The table that begins with the same line, to its end."""
    return re.compile(re.escape(table.partition("\n")[0]) + r"(?:\n(?!```).+)*")


def parts():
    """[(pattern, the words or first line that it finds, the table or the figures)]"""
    return [(pattern_of_table(table), table.partition("\n")[0], table) for table in tables()] + [
        (pattern_of(words), words, measured) for words, *measured in figures()]


def found_in(texts, pattern):
    """[(path, match)]"""
    return [(path, match) for path, text in texts.items() for match in pattern.finditer(text)]


def filled(texts):
    """{path: text} with every table and figure as it was measured.

    Raises:
        ValueError: where words, or the first line of a table, stand in no page or more than once.
    """
    texts, misplaced = dict(texts), []
    for pattern, words, measured in parts():
        found = found_in(texts, pattern)
        if len(found) != 1:
            misplaced.append(f"{words!r} stands {len(found)} times in the pages, and needs one place")
            continue
        [(path, match)] = found
        texts[path] = texts[path][:match.start()] + replaced(match, measured) + texts[path][match.end():]
    if misplaced:
        raise ValueError("; ".join(misplaced))
    return texts


def replaced(match, measured):
    """The matched text with what was measured in place of the whole, or of each group."""
    if isinstance(measured, str):
        return measured
    text, start = match.group(), match.start()
    for number, figure in reversed(list(enumerate(measured, start=1))):
        text = text[:match.start(number) - start] + figure + text[match.end(number) - start:]
    return text


def main():
    before = {path: path.read_text(encoding="utf-8") for path in PAGES}
    for path, text in filled(before).items():
        if text != before[path]:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} has other figures now")


if __name__ == "__main__":
    main()
