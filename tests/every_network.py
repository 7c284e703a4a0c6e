"""One stage for every network, in one process: python every_network.py STAGE PLACE (see test_networks.py)."""

import json
import sys
from pathlib import Path

SIGNED = """
output_dir: {place}/{stage}
arch: {arch}
target_bits: [4, 2]
dataloader: {{dataset: folder, path: {place}/images, input_size: {size}, batch_size: 4, workers: 0}}
wandb: {{mode: disabled}}
quan: {{act: {{all_positive: false}}, excepts: auto}}
epochs: 1
lr: 0.0001
momentum: 0
log: {{print_freq: 1}}
calibration_images: 8
policy: {place}/{name}.yaml
init_from: {place}/pretraining/{name}/{name}_checkpoint.pth.tar
"""


def configuration(place, stage, name, arch, size):
    """The path of a configuration file; stage 1 knows fewer keys."""
    lines = SIGNED.format(place=place, stage=stage, name=name, arch=arch, size=size).splitlines()
    keys = ("calibration", "policy", "init_from") if stage == "pretraining" else ()
    path = place / f"{stage}_{name}.config"
    path.write_text("\n".join(line for line in [f"name: {name}", *lines] if not line.startswith(keys or "?")))
    return str(path)


def pretraining(place, *network):
    import importance_extractor
    import main

    name = network[0]
    main.main([configuration(place, "pretraining", *network)])
    importance_extractor.main([f"{place}/pretraining/{name}/{name}_checkpoint.pth.tar", "--output", f"{place}/{name}.pkl"])


def search(place, name, arch, size):
    import search

    search.main(["--model", arch, "--i", f"{place}/{name}.pkl", "--b", "4", "2", "--wb", "3", "--ab", "3", "--cr", "0",
                 "--bops", "True", "--output", f"{place}/{name}.yaml"])


def training(place, *network):
    import main

    main.main([configuration(place, "training", *network)])
    main.main([configuration(place, "training", *network), "eval=true", "init_from="])


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    stage, place = sys.argv[1], Path(sys.argv[2])
    for network in json.loads((place / "networks.json").read_text()):
        print(f"== {network[0]}", flush=True)
        globals()[stage](place, *network)
