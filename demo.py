"""make demo and make demo-pruned: the whole way on UCI digits, by the commands that the README gives, and one table.

python demo.py             a small MobileNetV2: dense weights, indicators, search, fine-tuning
python demo.py --pruned    ResNet-20: dense, 50 % and 80 % sparse, each searched and fine-tuned
with --record              also write it into measurements/, for the README; python -m measurements.pages puts it there
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

from experiments.steps import Command, Runner

ROOT = Path(__file__).resolve().parent
PRETRAINING, SEARCH, TRAINING = "indicators_pretraining", "quantization_search", "quantization_training"
NAME = "mobilenet_digits"
POLICY, PLOT = f"results/policy_{NAME}_w3a3.yaml", f"results/policy_{NAME}_w3a3.png"
TUNED = f"results/{NAME}_w3a3/{NAME}_w3a3_checkpoint.pth.tar"
PACKED = f"results/{NAME}_w3a3.safetensors"
SPEED_BATCH = 64
ACCURACY = f"{TRAINING}/results/{NAME}.png"
DENSE, UNIFORM, SEARCHED = "dense, 32 bits", "uniform W3A3", "searched at W3A3"
SEEDS = range(3)  # of fine-tuning
LEVELS = {0: "dense", 1: "50 % sparse", 2: "80 % sparse"}
PRUNED = "results/resnet20_digits_pruning"


def step(title, folder, command, output):
    """One command of the demo; output: the file it leaves, relative to that folder."""
    return Command(title, folder, tuple(command), ROOT / folder / output)


def training(title, folder, name, config, *overrides):
    return step(title, folder, ["main.py", config, *overrides], f"results/{name}/summary.yaml")


def extraction(title, name, indicators):
    return step(title, PRETRAINING, ["importance_extractor.py", f"results/{name}/{name}_checkpoint.pth.tar", "--output",
                                     indicators], indicators)


def search(title, indicators, policy, *budgets):
    command = ["search.py", "--i", f"../{PRETRAINING}/{indicators}", "--b", *"65432", *budgets, "--bops", "True",
               "--output", policy, "--plot", policy.replace(".yaml", ".png")]
    return step(title, SEARCH, command, policy)


def steps():
    """make demo: what runs before fine-tuning, fine-tuning for each seed, and what runs after it."""
    indicators, tuning = f"results/{NAME}/fisher.pkl", f"finetune_{NAME}_w3a3.yaml"
    first = [
        training("train a small MobileNetV2 in full precision", TRAINING, f"{NAME}_dense", f"config_{NAME}.yaml"),
        training("train it jointly at all bit-widths", PRETRAINING, NAME, f"config_{NAME}.yaml"),
        step("measure the importance indicators", PRETRAINING, ["sensitivity.py", f"config_{NAME}.yaml", "--of", "fisher",
                                                                "--output", indicators], indicators),
        search("search a policy at the BitOPs of uniform W3A3", indicators, POLICY, "--wb", "3", "--ab", "3", "--cr", "0"),
    ]
    uniform = ["policy=", "weight_bits=3", "act_bits=3"]
    tunings = [training(f"fine-tune {how}, seed {seed}", TRAINING, name, tuning,
                        *([f"name={name}", *words] if words or seed else []), *([f"seed={seed}"] if seed else []))
               for how, names, words in (("at the searched policy", runs_of(SEARCHED), []),
                                         ("at uniform 3 bits", runs_of(UNIFORM), uniform))
               for seed, name in zip(SEEDS, names, strict=True)]
    return first, tunings, [step("pack the searched network", TRAINING, ["export.py", TUNED, "--output", PACKED], PACKED)]


def runs_of(network):
    """The names of the runs of a network, a run for each seed; the dense one has one."""
    if network == DENSE:
        return [f"{NAME}_dense"]
    name = f"{NAME}_w3a3" if network == SEARCHED else f"{NAME}_uniform_w3a3"
    return [f"{name}_seed{seed}" if seed else name for seed in SEEDS]


def pruned_steps():
    """make demo-pruned."""
    chain = [step("prune ResNet-20 to 50 % and 80 %, rewinding", PRETRAINING, ["pruning.py", "prune_resnet20_digits.yaml"],
                  f"{PRUNED}/summary.yaml")]
    for level, words in LEVELS.items():
        name = name_of(level)
        indicators, policy = f"results/{name}/importance_indicators.pkl", f"results/policy_{name}_w3a3.yaml"
        chain += [
            training(f"pre-train the importance indicators, {words}", PRETRAINING, name, "config_resnet20_digits.yaml",
                     f"name={name}", "pre_trained=false", f"init_from={PRUNED}/level_{level}_checkpoint.pth.tar"),
            extraction("extract them", name, indicators),
            # 10.59x is the size of uniform 3 bits with 8 bits in the first and the last layer
            search("search a policy at the cost of uniform W3A3", indicators, policy, "--wb", "3", "--ab", "3", "--cr",
                   "10.59"),
            training("fine-tune at the searched policy", TRAINING, f"{name}_w3a3", "finetune_resnet20_digits_w3a3.yaml",
                     f"name={name}_w3a3", f"policy=../{SEARCH}/{policy}",
                     f"init_from=../{PRETRAINING}/results/{name}/{name}_checkpoint.pth.tar"),
        ]
    return chain


def name_of(level):
    return f"resnet20_digits_level_{level}"


def announced(command):
    """Whether a command has to run; what it made is named otherwise."""
    if command.is_done:
        print(f"\n== {command.key}: found {command.made.relative_to(ROOT)}")
    else:
        print(f"\n== {command.key}\n$ {command.line}", flush=True)
    return not command.is_done


def run(command):
    """Run a command, unless its output is there already; returns whether it ran."""
    if not announced(command):
        return False
    begun = time.time()
    process = command.start(ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the command got it, too
        process.wait()
        sys.exit("stopped; the same command goes on from there")
    if status:
        sys.exit(f"the command above ended with status {status}; mend what it says and run the demo again")
    print(f"({time.time() - begun:.0f} s)")
    return True


def summary(folder, name):
    return yaml.safe_load((ROOT / folder / "results" / name / "summary.yaml").read_text())


def run_together(commands):
    """Run commands of one thread each, as many at a time as there are cores, unless their outputs are there already; returns
    whether all of them ran."""
    left = [command for command in commands if announced(command)]
    logs = ROOT / TRAINING / "results" / "demo_logs"
    failed = Runner(os.cpu_count(), ROOT, logs).run(left) if left else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; what they said lies in {logs}; mend it and run the demo again")
    return len(left) == len(commands)


def top1_of(network):
    """Top-1 in % of each run of a network."""
    return [summary(TRAINING, name)["top1"] for name in runs_of(network)]


def rows():
    """Accuracy and cost of each network, from the summaries of its runs: the mean over seeds, and the standard deviation."""
    found = []
    for network in (DENSE, UNIFORM, SEARCHED):
        top1, first = top1_of(network), summary(TRAINING, runs_of(network)[0])
        found.append({"network": network, "top1": statistics.mean(top1),
                      "top1_sd": statistics.stdev(top1) if len(top1) > 1 else "",
                      **{key: first[key] for key in ("size_mb", "ratio", "gbitops")}})
    return found


def table(found):
    lines = [f"{'network':<18} {'top-1 %':>14} {'size MB':>9} {'smaller':>9} {'BitOPs G':>9}"]
    for row in found:
        top1, size, ratio, bitops = (float(row[key]) for key in ("top1", "size_mb", "ratio", "gbitops"))
        spread = f" ± {float(row['top1_sd']):.2f}" if row["top1_sd"] else ""
        lines.append(f"{row['network']:<18} {f'{top1:.2f}{spread}':>14} {size:>9.4f} {ratio:>8.2f}x {bitops:>9.4f}")
    return "\n".join(lines)


def save_plot(found, path):
    """Top-1 against BitOPs: the mean over seeds of each network, and a dot for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for row in found:
        [mean] = axes.plot(1000 * row["gbitops"], row["top1"], "o")
        runs = top1_of(row["network"])
        axes.plot([1000 * row["gbitops"]] * len(runs), runs, ".", alpha=0.5, color=mean.get_color())
        axes.annotate(row["network"], (1000 * row["gbitops"], row["top1"]), (6, 6), textcoords="offset points")
    axes.set(xscale="log", xlabel="BitOPs of the whole network in millions", ylabel="top-1 on the test set in %",
             xlim=(5, 5000))
    axes.margins(y=0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def pruned_rows():
    """Accuracy before and after quantization, and cost, of each level."""
    levels, found = summary(PRETRAINING, Path(PRUNED).name)["levels"], []
    for level, title in LEVELS.items():
        row = summary(TRAINING, f"{name_of(level)}_w3a3")
        found.append({"network": title, "dense_top1": levels[level]["top1"], "top1": row["top1"], "size_mb": row["size_mb"],
                      "sparse_size_mb": row.get("sparse_size_mb", row["size_mb"]),
                      "sparse_ratio": row.get("sparse_ratio", row["ratio"]), "gbitops": row["gbitops"],
                      "gbitops_effective": row.get("gbitops_effective", row["gbitops"])})
    return found


def pruned_table(found):
    lines = [f"{'network':<12} {'32 bits, %':>10} {'W3A3, %':>8} {'size MB':>8} {'sparse MB':>10} {'total compression':>18} "
             f"{'BitOPs G':>9} {'effective G':>12}"]
    for row in found:
        before, after, size, sparse, ratio, bitops, effective = (float(value) for value in list(row.values())[1:])
        lines.append(f"{row['network']:<12} {before:>10.2f} {after:>8.2f} {size:>8.4f} {sparse:>10.4f} {ratio:>17.2f}x "
                     f"{bitops:>9.4f} {effective:>12.4f}")
    return "\n".join(lines)


def write_csv(name, found):
    with open(ROOT / "measurements" / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, found[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def note(name, value, unit, command):
    """Put one figure into measurements/figures.csv, in the place of the one of that name."""
    with open(ROOT / "measurements" / "figures.csv", newline="", encoding="utf-8") as file:
        figures = {row["name"]: row for row in csv.DictReader(file)}
    figures[name] = {"name": name, "value": value, "unit": unit, "command": command}
    write_csv("figures.csv", list(figures.values()))


def record(found, is_pruned, seconds):
    """Write what the README shows; `seconds` is None where some of the results had been there before."""
    command = "python demo.py --pruned --record" if is_pruned else "python demo.py --record"
    write_csv("demo_pruned.csv" if is_pruned else "demo.csv", found)
    if seconds is not None:
        note("demo pruned" if is_pruned else "demo", round(seconds), "s", command)
    if not is_pruned:
        note("demo packed", packed_bytes(), "bytes", command)


def packed_bytes():
    """What the packed file takes on the disk, all that the network needs in it."""
    return (ROOT / TRAINING / PACKED).stat().st_size


def packed_speed():
    """How many times faster the packed network is than the dense one, both in batches of SPEED_BATCH."""
    code = f"import benchmark; print(benchmark.speed({PACKED!r}, {SPEED_BATCH}))"
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT / TRAINING, capture_output=True, text=True,
                                check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--pruned", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    begun = time.time()
    if options.pruned:
        have_run = [run(command) for command in pruned_steps()]
    else:
        before, tunings, after = steps()
        have_run = [*map(run, before), run_together(tunings), *map(run, after)]
    found, seconds = pruned_rows() if options.pruned else rows(), time.time() - begun
    if options.record:
        record(found, options.pruned, seconds if all(have_run) else None)
    network, shown = ("ResNet-20", pruned_table(found)) if options.pruned else ("A small MobileNetV2", table(found))
    print(f"\n{network} on UCI digits (359 test images), {seconds:.0f} s in all\n\n{shown}\n")
    if options.pruned:
        print(f"accuracy against sparsity: {PRETRAINING}/{PRUNED}/pruning.png")
    else:
        size, ahead = packed_bytes(), [a - b for a, b in zip(top1_of(SEARCHED), top1_of(UNIFORM), strict=True)]
        print(f"searched ahead of uniform bits by {statistics.mean(ahead):.2f} ± {statistics.stdev(ahead):.2f} points, over "
              f"{len(ahead)} seeds of fine-tuning")
        save_plot(found, ROOT / ACCURACY)
        print(f"accuracy against BitOPs: {ACCURACY}")
        print(f"the bit-packed model: {TRAINING}/{PACKED}, {size:,} bytes ({size / 2**20:.4f} MB), computed "
              f"{packed_speed():.1f} times as fast as the dense one (export.py --benchmark)")
        print(f"the policy: {SEARCH}/{POLICY}\nits plot: {SEARCH}/{PLOT}")
    print("training curves: */results/*/curves.png\nmake clean removes all of it")


if __name__ == "__main__":
    main()
