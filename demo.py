"""make demo: the whole way on UCI digits, by the commands that the README gives, and one table at the end."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent
PRETRAINING, SEARCH, TRAINING = "indicators_pretraining", "quantization_search", "quantization_training"
JOINT = "results/resnet20_digits/resnet20_digits_checkpoint.pth.tar"
INDICATORS = "results/resnet20_digits/importance_indicators_resnet20_digits.pkl"
POLICY = "results/policy_resnet20_digits_w3a3.yaml"
PICTURE = "results/policy_resnet20_digits_w3a3.png"


@dataclass(frozen=True)
class Step:
    """One command of the demo: what it does, where it runs, and which file it leaves (relative to that folder)."""

    title: str
    folder: str
    command: list
    output: str


def training(title, folder, name, config):
    return Step(title, folder, ["main.py", config], f"results/{name}/summary.yaml")


# 10.59x is the size of uniform 3 bits with 8 bits in the first and the last layer
STEPS = [
    training("train ResNet-20 in full precision", TRAINING, "resnet20_digits_dense", "config_resnet20_digits.yaml"),
    training("pre-train the importance indicators", PRETRAINING, "resnet20_digits", "config_resnet20_digits.yaml"),
    Step("extract them", PRETRAINING, ["importance_extractor.py", JOINT, "--output", INDICATORS], INDICATORS),
    Step("search a policy at the cost of uniform W3A3", SEARCH,
         ["search.py", "--model", "resnet20", "--i", f"../{PRETRAINING}/{INDICATORS}", "--b", "6", "5", "4", "3", "2",
          "--wb", "3", "--ab", "3", "--cr", "10.59", "--bops", "True", "--output", POLICY, "--plot", PICTURE], POLICY),
    training("fine-tune at the searched policy", TRAINING, "resnet20_digits_w3a3", "finetune_resnet20_digits_w3a3.yaml"),
    training("fine-tune at uniform 3 bits", TRAINING, "resnet20_digits_uniform3",
             "finetune_resnet20_digits_uniform3.yaml"),
]
ROWS = {"dense, 32 bits": "resnet20_digits_dense", "uniform W3A3": "resnet20_digits_uniform3",
        "searched at W3A3": "resnet20_digits_w3a3"}


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
        sys.exit(f"the command above ended with status {done.returncode}; mend what it says and type make demo again")
    print(f"({time.time() - begun:.0f} s)")


def table():
    """Accuracy and cost of each network, from the summaries of the runs."""
    lines = [f"{'network':<18} {'top-1 %':>8} {'size MB':>9} {'smaller':>9} {'BitOPs G':>9}"]
    for title, name in ROWS.items():
        row = yaml.safe_load((ROOT / TRAINING / "results" / name / "summary.yaml").read_text())
        lines.append(f"{title:<18} {row['top1']:>8.2f} {row['size_mb']:>9.4f} {row['ratio']:>8.2f}x {row['gbitops']:>9.4f}")
    return "\n".join(lines)


def main():
    begun = time.time()
    for step in STEPS:
        run(step)
    print(f"\nResNet-20 on UCI digits (359 test images, 16x16), {time.time() - begun:.0f} s in all\n\n{table()}\n\n"
          f"the policy: {SEARCH}/{POLICY}\nwhere the bits went: {SEARCH}/{PICTURE}\n"
          "training curves: */results/*/curves.png\nmake clean removes all of it")


if __name__ == "__main__":
    main()
