"""What computing the stem once for all passes of a joint step saves. From indicators_pretraining, on a quiet machine:
python ../measurements/stem.py ../measurements/stem.csv

Joint steps at 6, 5, 4, 3 and 2 bits and one random policy, on 4 images of 224x224, with a shared stem and without, by turns.
"""

import csv
import statistics
import sys
import time

import torch

sys.path.insert(0, ".")
import bench

ROUNDS = 5


def main(path):
    rows, find_stem = [], bench.find_stem
    for arch in ("resnet18", "resnet50"):
        work, steps = bench.Workload(torch.device("cpu"), arch, 4, 224), {}
        for title, finder in (("shared", find_stem), ("in each pass", lambda *_: [])):
            bench.find_stem = finder
            steps[title] = work.joint()
        seconds = {title: [] for title in steps}
        for _ in range(ROUNDS + 1):
            for title, step in steps.items():
                begun = time.perf_counter()
                step()
                seconds[title].append(time.perf_counter() - begun)
        shared, apart = (seconds[title][1:] for title in steps)  # the first ones still set step sizes
        ratios = [one / other for one, other in zip(shared, apart, strict=True)]
        rows.append({"arch": arch, "seconds_shared": round(statistics.median(shared), 3),
                     "seconds_in_each_pass": round(statistics.median(apart), 3),
                     "median_ratio": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3),
                     "highest": round(max(ratios), 3)})
        print(rows[-1], flush=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1])
