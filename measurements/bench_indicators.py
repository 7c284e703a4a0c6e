"""What each measured indicator costs in time, whole commands: from the folder indicators_pretraining,

python ../measurements/bench_indicators.py CHECKPOINT CONFIG.yaml [key=value ...]

with a jointly trained network and the configuration of its data. Writes measurements/indicator_costs.csv.
"""

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMAGES = 1000
OF = ("noise", "fisher", "kl", "loss")


def seconds_of(of, checkpoint, words):
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        command = [sys.executable, "sensitivity.py", *words, f"resume.path={checkpoint}", "--of", of, "--images", str(IMAGES),
                   "--output", f"{folder}/i.pkl"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return round(time.time() - begun, 1)


def main():
    checkpoint, *words = sys.argv[1:]
    rows = [{"indicators": of, "images": IMAGES, "seconds": seconds_of(of, checkpoint, words)} for of in OF]
    with open(Path(__file__).with_name("indicator_costs.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
