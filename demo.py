"""make demo and make demo-pruned: the whole way on UCI digits, by the commands that the README gives, and one table.

python demo.py             dense weights, indicators, search, fine-tuning
python demo.py --pruned    dense, 50 % and 80 % sparse, each searched and fine-tuned
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent
PRETRAINING, SEARCH, TRAINING = "indicators_pretraining", "quantization_search", "quantization_training"
POLICY = "results/policy_resnet20_digits_w3a3.yaml"
PICTURE = "results/policy_resnet20_digits_w3a3.png"
TUNED = "results/resnet20_digits_w3a3/resnet20_digits_w3a3_checkpoint.pth.tar"
PACKED = "results/resnet20_digits_w3a3.safetensors"
ROWS = {"dense, 32 bits": "resnet20_digits_dense", "uniform W3A3": "resnet20_digits_uniform3",
        "searched at W3A3": "resnet20_digits_w3a3"}
LEVELS = {0: "dense", 1: "50 % sparse", 2: "80 % sparse"}
PRUNED = "results/resnet20_digits_pruning"


@dataclass(frozen=True)
class Step:
    """One command of the demo: what it does, where it runs, and which file it leaves (relative to that folder)."""

    title: str
    folder: str
    command: list
    output: str


def training(title, folder, name, config, *overrides):
    return Step(title, folder, ["main.py", config, *overrides], f"results/{name}/summary.yaml")


def extraction(title, name, indicators):
    return Step(title, PRETRAINING, ["importance_extractor.py", f"results/{name}/{name}_checkpoint.pth.tar",
                                     "--output", indicators], indicators)


def search(title, indicators, policy, *more):
    # 10.59x is the size of uniform 3 bits with 8 bits in the first and the last layer
    return Step(title, SEARCH, ["search.py", "--model", "resnet20", "--i", f"../{PRETRAINING}/{indicators}",
                                "--b", "6", "5", "4", "3", "2", "--wb", "3", "--ab", "3", "--cr", "10.59",
                                "--bops", "True", "--output", policy, *more], policy)


def steps():
    """make demo."""
    indicators = "results/resnet20_digits/importance_indicators_resnet20_digits.pkl"
    return [
        training("train ResNet-20 in full precision", TRAINING, "resnet20_digits_dense", "config_resnet20_digits.yaml"),
        training("pre-train the importance indicators", PRETRAINING, "resnet20_digits", "config_resnet20_digits.yaml"),
        extraction("extract them", "resnet20_digits", indicators),
        search("search a policy at the cost of uniform W3A3", indicators, POLICY, "--plot", PICTURE),
        training("fine-tune at the searched policy", TRAINING, "resnet20_digits_w3a3",
                 "finetune_resnet20_digits_w3a3.yaml"),
        training("fine-tune at uniform 3 bits", TRAINING, "resnet20_digits_uniform3",
                 "finetune_resnet20_digits_uniform3.yaml"),
        Step("pack the searched network", TRAINING, ["export.py", TUNED, "--output", PACKED], PACKED),
    ]


def pruned_steps():
    """make demo-pruned."""
    chain = [Step("prune ResNet-20 to 50 % and 80 %, rewinding", PRETRAINING, ["pruning.py", "prune_resnet20_digits.yaml"],
                  f"{PRUNED}/summary.yaml")]
    for level, words in LEVELS.items():
        name = name_of(level)
        indicators, policy = f"results/{name}/importance_indicators.pkl", f"results/policy_{name}_w3a3.yaml"
        chain += [
            training(f"pre-train the importance indicators, {words}", PRETRAINING, name, "config_resnet20_digits.yaml",
                     f"name={name}", "pre_trained=false", f"init_from={PRUNED}/level_{level}_checkpoint.pth.tar"),
            extraction("extract them", name, indicators),
            search("search a policy at the cost of uniform W3A3", indicators, policy, "--plot",
                   policy.replace(".yaml", ".png")),
            training("fine-tune at the searched policy", TRAINING, f"{name}_w3a3", "finetune_resnet20_digits_w3a3.yaml",
                     f"name={name}_w3a3", f"policy=../{SEARCH}/{policy}",
                     f"init_from=../{PRETRAINING}/results/{name}/{name}_checkpoint.pth.tar"),
        ]
    return chain


def name_of(level):
    return f"resnet20_digits_level_{level}"


def run(step):
    """Run a step in its folder, unless its output is there already."""
    if (ROOT / step.folder / step.output).exists():
        print(f"\n== {step.title}: found {step.folder}/{step.output}")
        return
    print(f"\n== {step.title}\n$ cd {step.folder} && python {' '.join(step.command)}", flush=True)
    begun = time.time()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, *step.command], cwd=ROOT / step.folder, env=environment, check=False)
    if done.returncode:
        sys.exit(f"the command above ended with status {done.returncode}; mend what it says and run the demo again")
    print(f"({time.time() - begun:.0f} s)")


def summary(folder, name):
    return yaml.safe_load((ROOT / folder / "results" / name / "summary.yaml").read_text())


def table():
    """Accuracy and cost of each network, from the summaries of the runs."""
    lines = [f"{'network':<18} {'top-1 %':>8} {'size MB':>9} {'smaller':>9} {'BitOPs G':>9}"]
    for title, name in ROWS.items():
        row = summary(TRAINING, name)
        lines.append(f"{title:<18} {row['top1']:>8.2f} {row['size_mb']:>9.4f} {row['ratio']:>8.2f}x {row['gbitops']:>9.4f}")
    return "\n".join(lines)


def pruned_table():
    """Accuracy before and after quantization, and cost, of each level."""
    lines = [f"{'network':<12} {'32 bits, %':>10} {'W3A3, %':>8} {'size MB':>8} {'sparse MB':>10} {'smaller in all':>15} "
             f"{'BitOPs G':>9} {'effective G':>12}"]
    levels = summary(PRETRAINING, Path(PRUNED).name)["levels"]
    for level, title in LEVELS.items():
        row = summary(TRAINING, f"{name_of(level)}_w3a3")
        lines.append(f"{title:<12} {levels[level]['top1']:>10.2f} {row['top1']:>8.2f} {row['size_mb']:>8.4f} "
                     f"{row.get('sparse_size_mb', row['size_mb']):>10.4f} {row.get('sparse_ratio', row['ratio']):>14.2f}x "
                     f"{row['gbitops']:>9.4f} {row.get('gbitops_effective', row['gbitops']):>12.4f}")
    return "\n".join(lines)


def packed_size():
    """What the packed file takes on the disk, all that the network needs in it."""
    size = (ROOT / TRAINING / PACKED).stat().st_size
    return f"the packed model: {TRAINING}/{PACKED}, {size:,} bytes ({size / 2**20:.4f} MB) with BatchNorm, steps and header"


def main():
    is_pruned = sys.argv[1:] == ["--pruned"]
    if sys.argv[1:] and not is_pruned:
        sys.exit(__doc__)
    begun = time.time()
    for step in pruned_steps() if is_pruned else steps():
        run(step)
    print(f"\nResNet-20 on UCI digits (359 test images, 16x16), {time.time() - begun:.0f} s in all\n\n"
          f"{pruned_table() if is_pruned else table()}\n")
    if is_pruned:
        print(f"accuracy against sparsity: {PRETRAINING}/{PRUNED}/pruning.png")
    else:
        print(packed_size())
        print(f"the policy: {SEARCH}/{POLICY}\nwhere the bits went: {SEARCH}/{PICTURE}")
    print("training curves: */results/*/curves.png\nmake clean removes all of it")


if __name__ == "__main__":
    main()
