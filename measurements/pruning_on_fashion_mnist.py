"""ResNet-20 on a tenth of Fashion-MNIST, pruned by three methods with three seeds: top-1 on the test set at each level, mean
and standard deviation, in measurements/pruning_on_fashion_mnist.csv.

python measurements/pruning_on_fashion_mnist.py [dotted.key=value ...]      # hours; what is there is not computed again
"""

import csv
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / "indicators_pretraining"
SEEDS, LEVELS = (0, 1, 2), 4
COLUMNS = ("level", "sparsity", "ratio", "method", "top1", "top1_sd", "n")


def pruned(name, *words):
    """The rows of pruning.csv of a run, one per level."""
    command = [sys.executable, "pruning.py", "prune_resnet20_fashion_mnist.yaml", f"name={name}", *words, *sys.argv[1:]]
    subprocess.run(command, cwd=STAGE, check=True)
    with open(STAGE / "results" / f"{name}_pruning" / "pruning.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def methods_of(seed):
    """{method: rows}; in one shot, level 1 is that of rewinding, and each further one a run of its own."""
    rewinding = pruned(f"rewinding_{seed}", f"seed={seed}")
    iterative = pruned(f"iterative_{seed}", f"seed={seed}", "prune.method=iterative")
    one_shot = [pruned(f"one_shot_{level}_{seed}", f"seed={seed}", "prune.method=one_shot", f"prune.levels={level}")[-1]
                for level in range(2, LEVELS + 1)]
    return {"rewinding": rewinding, "iterative": iterative, "one_shot": rewinding[:2] + one_shot}


def main():
    seeds = [methods_of(seed) for seed in SEEDS]
    with open(ROOT / "measurements" / "pruning_on_fashion_mnist.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for level in range(LEVELS + 1):
            for method, rows in seeds[0].items():
                reached = [float(seed[method][level]["top1"]) for seed in seeds]
                writer.writerow([level, rows[level]["sparsity"], rows[level]["sparse_ratio"], method,
                                 round(statistics.fmean(reached), 4), round(statistics.stdev(reached), 4), len(reached)])


if __name__ == "__main__":
    main()
