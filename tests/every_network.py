"""Stages for every network, in one process: python every_network.py STAGE[,STAGE] PLACE (see test_networks.py, networks.py).

PLACE holds images/ and networks.json, a list of [name, arch, input size] and, where it is not false, quan.act.all_positive.
"""

import json
import sys
from pathlib import Path

STAGES = {"pretraining": "indicators_pretraining", "search": "quantization_search", "training": "quantization_training"}
SETTINGS = """
output_dir: {place}/{stage}
arch: {arch}
target_bits: [4, 2]
dataloader: {{dataset: folder, path: {place}/images, input_size: {size}, batch_size: 4, workers: 0}}
wandb: {{mode: disabled}}
quan: {{act: {{all_positive: {positive}}}, excepts: auto}}
epochs: 1
lr: 0.0001
momentum: 0
log: {{print_freq: 1}}
calibration_images: 8
policy: {place}/{name}.yaml
init_from: {place}/pretraining/{name}/{name}_checkpoint.pth.tar
"""


def write_images(folder):
    """Eight training and four test images of two classes, drawn at random."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for kind in ("dark", "light"):
            (folder / part / kind).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8) + 127 * (kind == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / kind / f"{number}.png")


def configuration(place, stage, name, arch, size, positive="false"):
    """The path of a configuration file; stage 1 knows fewer keys."""
    lines = SETTINGS.format(**locals()).splitlines()
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


def search(place, name, arch, *_):
    import search

    search.main(["--model", arch, "--i", f"{place}/{name}.pkl", "--b", "4", "2", "--wb", "3", "--ab", "3", "--cr", "0",
                 "--bops", "True", "--output", f"{place}/{name}.yaml"])


def training(place, *network):
    import main

    main.main([configuration(place, "training", *network)])
    main.main([configuration(place, "training", *network), "eval=true", "init_from="])


def packing(place, name, arch, size, *_):
    """Writes packed models, compares them with the checkpoint, and leaves in NAME.json what is to be said of the network."""
    import torch

    import export
    from packed_network import load_any, rebuild
    from util.errors import UserError

    own = arch if ".py:" in arch else None
    files = {"checkpoint": f"{place}/training/{name}/{name}_checkpoint.pth.tar"}
    for kind, options in (("packed", []), ("folded", ["--fold-bn"])):
        files[kind] = f"{place}/{name}_{kind}.safetensors"
        try:
            export.main([files["checkpoint"], "--output", files[kind], *options, *(["--arch", own] if own else [])])
        except UserError as error:  # a network that does not take it: the packed model without is whole
            if not str(error).startswith("--fold-bn: ") or Path(files[kind]).exists():
                raise
            del files[kind]
    images, networks = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1)), {}
    for kind, path in files.items():
        content = load_any(path)
        networks[kind] = rebuild(content, path, own)
    graph, folds = networks["checkpoint"].graph, content["packed"].header["folded"]
    with torch.no_grad():
        models = [networks.get(kind, networks["packed"]).model for kind in ("checkpoint", "packed", "folded")]
        layers = change_by_folding(models[0], models[2], folds, images)
        right, packed, folded = (model(images.clone()) for model in models)
    counted, left = sum(call.params for call in graph.layers.values()), sum(graph.uncounted.values())
    products, macs = (sum(graph.non_layer_macs.values()), sum(call.macs_exact for call in graph.layers.values()))
    (place / f"{name}.json").write_text(json.dumps({
        "is_equal": torch.equal(right, packed), "folded": len(folds) if "folded" in files else "refused",
        "layer_change": layers,
        "logit_change": change(right, folded), "layers": len(graph.layers), "weights": counted + left,
        "left_share": left / (counted + left), "left": list(graph.uncounted), "products_share": products / (products + macs)}))


def change(before, after, scale=0.0):
    """The largest difference, of the largest value or of `scale` where that is larger."""
    return ((before - after).abs().max() / before.abs().max().clamp(min=max(scale, 1e-30))).item()


def change_by_folding(model, folded, folds, images):
    """The largest change of what a folded BatchNorm answers, each seen alone: its convolution gets the input that it has in
    the network without folding, where no error of an earlier layer moves a value across the border of two integers. What a
    BatchNorm takes away, its mean times its gain, may be far larger than what it answers; the error is one of that."""
    inputs, changes = {}, [0.0]

    def before(convolution):
        return lambda module, values: inputs.update({convolution: values[0].clone()})

    def after(convolution):
        def hook(batchnorm, values, output):
            gain = (batchnorm.running_var + batchnorm.eps).rsqrt() * (1 if batchnorm.weight is None else batchnorm.weight)
            again = folded.get_submodule(convolution)(inputs[convolution])
            changes.append(change(output, again, (batchnorm.running_mean * gain).abs().max().item()))
        return hook

    for batchnorm, convolution in folds.items():
        model.get_submodule(convolution).register_forward_pre_hook(before(convolution))
        model.get_submodule(batchnorm).register_forward_hook(after(convolution))
    model(images.clone())
    return max(changes)


def main(stages, place):
    """Run stages, separated by commas, in the folder of the first of them."""
    sys.path.insert(0, str(Path.cwd()))
    from util.errors import user_errors_on_one_line

    if stages != "search":
        import engine.monitor

        engine.monitor.save_curves = lambda *_: None  # plots say nothing of a network and take a third of its time
    for network in json.loads((place / "networks.json").read_text()):
        print(f"== {network[0]}", flush=True)
        with user_errors_on_one_line():
            for stage in stages.split(","):
                globals()[stage](place, *network)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
