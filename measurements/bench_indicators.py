"""What each measured indicator costs in time, whole commands: from the folder indicators_pretraining,

python ../measurements/bench_indicators.py CHECKPOINT CONFIG.yaml [key=value ...]

with a jointly trained network and the configuration of its data. Writes measurements/indicator_costs.csv.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, ".")  # the stage

from timing import show, timed

IMAGES = 1000
OF = ("noise", "fisher", "kl", "loss")


def measure(of, checkpoint, words):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "sensitivity.py", *words, f"resume.path={checkpoint}", "--of", of, "--images", str(IMAGES),
                   "--output", f"{folder}/i.pkl"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main():
    checkpoint, *words = sys.argv[1:]
    rows = [{"indicators": of, "images": IMAGES, "seconds": round(timed(lambda of=of: measure(of, checkpoint, words))[0], 1)}
            for of in OF]
    show(Path(__file__).with_name("indicator_costs.csv"), list(rows[0]), rows, 1)


if __name__ == "__main__":
    main()
