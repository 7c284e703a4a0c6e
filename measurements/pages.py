"""Puts what was measured into the pages: every table, and every figure in a sentence, from the CSV file that the
measuring command wrote.

python -m measurements.pages        after a command has written another CSV; tests/test_readme.py fails until then

A table is found by its first line, a figure by the words around it. Words without a place are an error, so a sentence that
goes takes its line here with it.
"""

import csv
import math
import pickle
import re

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
BITS_BY = {"uniform": "uniform", "fisher": "Fisher information", "joint_fisher": "joint Fisher, without extra passes",
           "fisher_quarter": "Fisher information, `--alpha 0.25`", "joint_fisher_quarter": "joint Fisher, `--alpha 0.25`",
           "refined": "joint Fisher, then refined", "kl": "KL divergence", "loss": "loss", "loss_share": "loss share",
           "noise": "noise-to-signal ratio", "steps": "step sizes (LIMPQ's)", "steps_auto": "step sizes, `--alpha auto`",
           "steps_floors": "step sizes, `auto`, with floors", "depth": "depth", "random0": "random, first draw",
           "random1": "random, second draw", "random2": "random, third draw",
           "fisher_reversed": "Fisher information, reversed", "joint_fisher_reversed": "joint Fisher, reversed",
           "kl_reversed": "KL divergence, reversed", "loss_share_reversed": "loss share, reversed",
           "noise_reversed": "noise-to-signal ratio, reversed", "steps_reversed": "step sizes, reversed"}
SHORT = ("fisher", "joint_fisher", "uniform", "steps", "random0", "fisher_reversed")
NETWORKS = {"MobileNetV2, digits": "importance", "MobileNetV2, Fashion-MNIST": "importance_fashion",
            "the demo's MobileNetV2, digits": "importance_demo", "small ViT, digits": "importance_vit",
            "ResNet-20, Fashion-MNIST": "importance_resnet20"}
GPUS_TAKE = (500, 1000, 2000, 4000)
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
    """measurements/bench_search.py"""
    own = {"proven": "", "HiGHS's word": ", ties not compared"}
    lines = []
    for line in found:
        case = line["case"].removeprefix("importance_indicators_").removesuffix(".pkl")
        plain = [two_digits(line[f"{name}_over_ours"], "x") + f", {line[f'plain_{name}']}".removeprefix(", the same objective")
                 if line[f"plain_{name}"] else "not run" for name in ("highs", "cbc")]
        lines.append([case, line["layers"], line["candidates"], two_digits(line["whole_command_s"], " s"),
                      two_digits(line["solving_s"], " s") + own.get(line["ours"], f", {line['ours']}"), *plain])
    return markdown(["case", "layers", "candidates", "whole command", "solving", "reference, HiGHS", "reference, CBC"], lines)


def training_table(found):
    """measurements/bench_training.py; the quantizer alone has no full-precision side."""
    keys = [f"{what}_over_{side}" for what in ("time", "memory") for side in ("chain", "floor")]
    lines = []
    for line in found:
        if line["case"] in ("quantizer", "joint step", "fine-tuning step") and line["side"] in OURS:
            shown = keys if line["case"] != "quantizer" else [key if "chain" in key else "" for key in keys]
            lines.append([OURS[line["side"]] or f"{line['case']}, {line['what']}",
                          *(number(line, key) if key else "" for key in shown)])
    return markdown(["work", "time over reference", "time over full precision", "memory over reference",
                     "memory over full precision"], lines)


def gpu_table(found):
    """measurements/bench_training.py on a GPU"""
    lines, steps = [], [line for line in found if line["case"].startswith("GPU, ")]
    for case, what in dict.fromkeys((line["case"], line["what"].rpartition(", ")[0]) for line in steps):
        cells = []
        for precision, shown in (("bf16", {"ours": ("time", "memory"), "ours, cuda_graphs: false": ("time",),
                                           "plain chain": ("time", "memory")}), ("fp32", {"ours": ("time", "memory")})):
            for side, keys in shown.items():
                measured = [line for line in steps if (line["case"], line["what"], line["side"]) == (
                    case, f"{what}, {precision}", side)]
                cells += [number(measured[0], f"{key}_over_floor") if measured else "" for key in keys]
        lines.append([f"{case.removeprefix('GPU, ')}, {what}", *cells])
    return markdown(["step on a GPU", "bfloat16, time", "memory", "one by one, time", "reference, time", "memory",
                     "float32, time", "memory"], lines)


def share_of_a_copy(side, dtype):
    """The bytes per second of the quantizers forward or backward, in percent of those of a copy."""
    copy, ours = (row("measurements/bench_training_h200.csv", case="quantizer kernels", what=f"128x256x56x56, {dtype}",
                      side=each) for each in ("copy", side))
    return f"{100 * float(copy['ms']) / float(ours['ms']) * {'forward': 1, 'backward': 1.5}[side]:.0f}"


def cores_table(found):
    """measurements/bench_loader.py, for GPUs that take so many images per second"""
    rate = next(float(line["images_per_s"]) for line in found if line["side"] == "ours")
    return markdown(["training images per second and GPU", "cores for one GPU", "cores for 8 GPUs"],
                    [[f"{images:,}", *(str(math.ceil(images * gpus / rate)) for gpus in (1, 8))] for images in GPUS_TAKE])


def inference_table(found):
    """measurements/bench_inference.py"""
    ways, lines = list(dict.fromkeys(line["way"] for line in found)), []
    for network, batch in dict.fromkeys((line["network"], line["batch"]) for line in found):
        of = {line["way"]: line for line in found if (line["network"], line["batch"]) == (network, batch)}
        dense, integer = of["float32"], of["packed, integer"]
        ratios = [number(of[way], "ratio") if way in of else "" for way in ways[1:]]
        share = float(integer["peak_mb"]) / float(dense["peak_mb"])
        lines.append([network, batch, number(dense, "ms", 1), *ratios, f"{share:.2f}"])
    return markdown(["network", "batch", "float32, ms", *ways[1:], "memory, integer over float32"], lines)


def policies_table(found):
    """experiments/policies.yaml"""
    budgets, policies = (list(dict.fromkeys(line[key] for line in found)) for key in ("budget", "policy"))
    reached = {(line["policy"], line["budget"]): spread(line) for line in found}
    return markdown(["policy", *budgets], [[policy, *(reached.get((policy, budget), "") for budget in budgets)]
                                           for policy in policies])


def importance_rows(name, budget):
    """{policy: its row} of experiments/importance*.csv"""
    return {line["policy"]: line for line in rows(f"experiments/{name}.csv") if line["budget"] == budget}


def mobilenet_table():
    """The policies that matter most, on MobileNetV2 at W3A3."""
    found = [importance_rows(name, "W3A3") for name in ("importance", "importance_fashion")]
    lines = [[BITS_BY[policy], *(cell for of in found for cell in (
        spread(of[policy]), spread(of[policy], "difference") if policy != "uniform" else ""))] for policy in SHORT]
    return markdown(["bits by", "digits", "ahead of uniform bits by", "Fashion-MNIST", "ahead of uniform bits by"], lines)


def importance_table(title, columns):
    """All policies: top-1 of uniform bits, and by how much others are ahead; top-1 where there are no uniform bits.

    columns: {heading: (name of the experiment, budget)}; `title` stands over the policies.
    """
    found = [importance_rows(*which) for which in columns.values()]
    lines = [[shown, *((spread(of[policy], "top1" if policy == "uniform" or "uniform" not in of else "difference")
                        if policy in of else "") for of in found)]
             for policy, shown in BITS_BY.items() if any(policy in of for of in found)]
    return markdown([title, *columns], lines)


def ranks_table(found):
    """experiments/importance_ranks.csv"""
    return markdown(["indicators", "with accuracy", "with loss"],
                    [[f"`{line['indicators']}`", spread(line, "top1_rank"), spread(line, "loss_rank")] for line in
                     sorted(found, key=lambda line: float(line["top1_rank"]))])


def costs_table(found):
    """measurements/bench_indicators.py"""
    passes = {"noise": "one forward pass", "fisher": "one forward and backward pass",
              "kl": "one forward pass from each layer on, for each of its bit-widths", "loss": "the same"}
    return markdown(["indicators", "passes over 1,000 images", "seconds"],
                    [["`steps`, `joint_fisher`, `loss_share`", "none", "0"],
                     *([f"`{line['indicators']}`", passes[line["indicators"]], number(line, "seconds", 0)] for line in found)])


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
    return markdown(["weights that are zero", "compression at 32 bits", *METHODS.values()], lines)


def onnx_table(found):
    """measurements/bench_onnx.py"""
    return markdown(["network, on one thread", "batch", "float32, ms", "`qdq`", "`integer`"],
                    [[f"{line['network']}, {line['pixels']} pixels", line["batch"], number(line, "float32_ms", 1),
                      number(line, "qdq_over_float32"), number(line, "integer_over_float32")] for line in found])


def onnx_classes_table(found):
    """measurements/bench_onnx.py --classes"""
    return markdown(["run on digits", "same class", "right in PyTorch", "right in onnxruntime", "error of a step, at most"],
                    [[f"`{line['run']}`", f"{line['same_class']} of {line['images']}", line["right_in_pytorch"],
                      line["right_in_onnxruntime"], number(line, "largest_bias_error", 4)] for line in found])


def digits_table(found):
    """measurements/networks_on_digits.sh"""
    lines = []
    for networks, title in ON_DIGITS.items():
        cells = {line["run"].rpartition("_")[2]: line for line in found if line["networks"] == networks}
        cells.setdefault("dense", next(line for line in found if line["run"] == "mobilenet_v2_digits_dense"))
        lines.append([title, f"{number(cells['dense'], 'top1')} %", *(
            f"{number(cells[kind], 'top1')} %, {number(cells[kind], 'times_smaller', 1)}x"
            for kind in ("uniform4", "searched4", "uniform3", "searched3"))])
    return markdown(["network", "full precision", "uniform W4A4", "searched W4A4", "uniform W3A3", "searched W3A3"], lines)


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
    return markdown(["network", "full precision", "6 bits", *"5432", "indicators smaller than with one bit more",
                     "not positive"], lines)


def read_indicators(name):
    return pickle.loads((INDICATORS / f"importance_indicators_{name}.pkl").read_bytes())


def tables():
    return [demo.table(rows("measurements/demo.csv")), demo.pruned_table(rows("measurements/demo_pruned.csv")),
            policies_table(rows("experiments/policies.csv")),
            mobilenet_table(), importance_table("at W3A3, bits by", {head: (name, "W3A3") for head, name in NETWORKS.items()}),
            importance_table("at other budgets, bits by", {
                f"{head}, {budget}": (name, budget) for head, name in NETWORKS.items() for budget in ("W2.5A2.5", "W4A4")
                if len(importance_rows(name, budget)) > 1}),
            ranks_table(rows("experiments/importance_ranks.csv")),
            costs_table(rows("measurements/indicator_costs.csv")),
            search_table(rows("measurements/bench_search_2_cores.csv")),
            training_table(rows("measurements/bench_training_2_cores.csv")),
            gpu_table(rows("measurements/bench_training_h200.csv")),
            inference_table(rows("measurements/bench_inference.csv")),
            cores_table(rows("measurements/loader.csv")),
            pruning_table(rows("measurements/pruning_on_fashion_mnist.csv")),
            onnx_table(rows("measurements/onnx_times.csv")), onnx_classes_table(rows("measurements/onnx_classes.csv")),
            digits_table(rows("measurements/networks_on_digits.csv")),
            shipped_table(rows("measurements/shipped_indicators.csv"))]


# ---------------------------------------------------------------------------------------------------------------------
# Figures in sentences.


def spread(line, key="top1", sign=1):
    """'92.91 ± 0.22' of a row of an experiment; with a proper minus sign, and none before a zero."""
    mean = round(sign * float(line[key]), 2) + 0.0
    return f"{mean:.2f} ± {number(line, key + '_sd')}".replace("-", "−")


def figures():
    """[(words with {} where a figure stands, the figures)]"""
    policies = {policy: row("experiments/policies.csv", budget="W3A3", policy=policy) for policy in ("uniform", "reversed")}
    read, large, half = (row("measurements/loader.csv", image=image, side=side) for image, side in (
        ("500x375", "ours"), ("2000x1500", "ours"), ("2000x1500", "decoded at half the size")))
    loss = row("experiments/vit.csv", budget="W2.5A2.5", policy="loss")
    return [
        ("After installation it took {} seconds", f"{noted('demo'):.0f}"),
        ("Over five seeds the searched network was ahead by {} points",
         spread(row("experiments/importance_demo.csv", policy="fisher"), "difference")),
        ("The commands took {} seconds", f"{noted('own network'):.0f}"),
        ("ended at {} % top-1", f"{noted('own network searched'):.2f}"),
        ("full-precision network has {} %", f"{noted('own network dense'):.2f}"),
        ("uniform bits in every seed, by {} points", spread(policies["uniform"], "difference", -1)),
        ("at any budget ({} points at W3A3)", spread(policies["reversed"], "difference", -1)),
        ("every seed, by {} points. The inputs", spread(loss, "difference")),
        ("With the BatchNorms held, that of `kl` with accuracy was {}, so",
         f"{noted('kl rank, held'):.2f} ± {noted('kl rank, held, error'):.2f}".replace("-", "−")),
        ("One core reads {} images of 500x375 pixels per second", number(read, "images_per_s", 0)),
        ("for crops of 224x224, {} times as many as", number(read, "over_reference")),
        ("by {} of 255 levels on average, and by at most {} level", number(read, "mean_difference"),
         read["largest_difference"]),
        ("images of 2000x1500 would be read {} times as fast, but their pixels change by {} levels on average",
         f"{float(half['images_per_s']) / float(large['images_per_s']):.2f}", number(half, "mean_difference")),
        ("move at {} % (forward) and {} % (backward) of the bytes per second of a copy in bfloat16, and at {} % and {} % in "
         "float32", *(share_of_a_copy(side, dtype) for dtype in ("bfloat16", "float32")
                              for side in ("forward", "backward"))),
        ("took {} times as long in fine-tuning and {} times in joint training, for the same gradients", *(
            number(row("measurements/ranks.csv", work=work, side="DistributedDataParallel"), "over_flat")
            for work in ("fine-tuning", "joint training"))),
        ("a ResNet-50 {} times as fast as without quantizers", number(
            row("measurements/bench_inference.csv", network="resnet50", batch="1", way="packed, integer"), "ratio")),
        ("jointly trained ones costs {} points",
         spread(row("experiments/parts.csv", choice="from_dense_weights"), "difference", -1)),
    ]


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
