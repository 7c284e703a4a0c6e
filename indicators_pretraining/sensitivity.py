"""Measure indicators instead of learning them: how far quantization moves the weights and activations of a network.

python sensitivity.py CONFIG.yaml [MORE.yaml ...] [dotted.key=value ...] --output FILE.pkl
                      [--of error|noise|fisher|kl|loss] [--images N]

With --of error, they are mean squared quantization errors, of the weight and of the input of each layer of the full-precision
network, at the step size with which the error is least. There is one step size per tensor, whatever quan.weight.per_channel
says.

All others look at the jointly trained network in resume.path, or in the folder of the run, and at one weight or input at a
time with fewer bits: its noise-to-signal ratio, the Fisher information's estimate of what it changes in the output, and the
measured KL divergence of the output, or loss. joint_sensitivity.py defines them.
"""

from util.errors import user_errors_on_one_line  # first, for Ctrl-C

# isort: split

import torch

import joint_sensitivity
from engine.metrics import evaluation_mode
from engine.passes import prepare_alone
from indicators import CARRIED, write
from network import build_dense, describe_network, with_signedness
from quan.utils import name_exceptions
from quantization_error import least_errors
from schema import IndicatorsConfig
from util import distributed
from util.command import Parser, add_configuration, split_configuration
from util.config import AUTO, load_config
from util.data_loader import create_loaders, describe_data
from util.errors import UserError
from util.exchange import check_outputs, split_arch

IMAGES = 1000
MOST_VALUES = 2**20  # of the input of a layer; where there are more, they are drawn at random


def main(arguments=None):
    options, configs, overrides = parse_arguments(arguments)
    is_joint = options.of != "error"
    config = load_config(IndicatorsConfig, configs, [*overrides, "eval=true"] if is_joint else overrides)
    check_outputs([("--output", options.output, "indicators")],
                  [*configs, config.init_from, config.pre_trained, config.resume.path])
    with distributed.process_group(config.training_device) as device:
        prepare_alone(config, "sensitivity.py", device)
        write(options.output, joint_sensitivity.measure(config, options.of, options.images, device) if is_joint
              else measure(config, options.images, device))


def parse_arguments(arguments):
    """(options, paths of YAML files, "key=value" strings)."""
    parser = Parser(description=__doc__)
    add_configuration(parser)
    parser.add_argument("--output", required=True, metavar="FILE.pkl")
    parser.add_argument("--of", choices=("error", *joint_sensitivity.MEASURES), default="error",
                        help="what is measured: of the full-precision network (error), or of the jointly trained one "
                             "(default error)")
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N",
                        help=f"how many training images are looked at (default {IMAGES})")
    options = parser.parse_intermixed_args(arguments)
    if options.images < 1:
        raise UserError(f"--images: found {options.images}, allowed is at least 1")
    if options.of == "kl" and options.images == 1:
        raise UserError(joint_sensitivity.ONE_IMAGE)
    return options, *split_configuration(options.words)


def measure(config, images, device):
    """The content of an indicators file, with quantization errors for indicators; inputs of layers come from so many training
    images, from all where there are fewer."""
    num_classes, input_size = describe_data(config.dataloader)
    model, metadata, config, remark = build_described(config, num_classes, input_size, device)
    loaders = create_loaders(config.dataloader, config.seed, 0, 1, device, evaluation_only=True)
    loader = loaders.calibration(images)
    print("\n".join(filter(None, [remark, f"inputs of layers from {loader.images} training images"])))
    inputs = watch_inputs(model, metadata["layers"], loader, config.seed)
    positive = config.quan.act.all_positive
    signed = {name: inputs[name].is_negative if positive == AUTO else not positive for name in metadata["layers"]}
    metadata["layers"] = with_signedness(metadata["layers"], signed)
    bits, quan = config.target_bits, config.quan
    weight = {name: least_errors(weight_of(model, name), bits, True, quan.weight.symmetric) for name in signed}
    act = {name: least_errors(inputs[name].values, bits, signed[name], quan.act.symmetric) for name in signed}
    return {"weight": weight, "act": act, "layer_name": list(signed), **{key: metadata[key] for key in CARRIED},
            "trained": {"dataset": config.dataloader.dataset, "epochs": 0, "images": loader.images, "seed": config.seed},
            "kind": "error"}


def build_described(config, num_classes, input_size, device):
    """The full-precision network of a configuration, what later stages need to know of it, the configuration with its
    exceptions named, and a remark on these, on what is left alone, and on weights that nobody trained, or ''."""
    network = build_dense(config, num_classes, input_size, None, device)
    network.pruned.apply()
    config, exceptions = name_exceptions(config, network.graph, network.model)
    metadata = describe_network(config, network.model, network.graph, num_classes, input_size, network.pruned.masks)
    untrained = not (config.init_from or config.pre_trained or split_arch(config.arch))
    warning = "warning: the network is untrained; give its weights by pre_trained or init_from" if untrained else ""
    remark = "\n".join(filter(None, [exceptions, network.graph.describe(), warning]))
    return network.model, {**metadata, "arch": config.arch}, config, remark


def weight_of(model, name):
    weight = model.get_submodule(name).weight.detach().cpu()
    check_finite(weight, f"the weight of {name}")
    return weight


def check_finite(values, what):
    if not torch.isfinite(values).all():
        raise UserError(f"{what} is not finite; give another checkpoint in pre_trained or init_from")


class Inputs:
    """Values that enter a layer, where so many are expected: all of them, or MOST_VALUES drawn with the torch.Generator
    `draws`. `is_negative` is whether any value, drawn or not, is."""

    def __init__(self, name, expected, draws):
        self.name, self.share, self.draws = name, MOST_VALUES / expected, draws
        self.pieces, self.is_negative = [], False

    def add(self, module, inputs):
        """Take from what enters the layer; a forward pre-hook."""
        values = inputs[0].detach().flatten()
        check_finite(values, f"the input of {self.name}")
        self.is_negative |= bool((values < 0).any())
        if self.share < 1:
            count = max(int(self.share * len(values)), 1)
            values = values[torch.randint(len(values), (count,), generator=self.draws).to(values.device)]
        self.pieces.append(values.cpu())

    @property
    def values(self):
        return torch.cat(self.pieces)


@torch.no_grad()
def watch_inputs(model, layers, loader, seed):
    """{layer: its Inputs} over the images of a loader, of the network in evaluation mode. Layers come as {name: row of the
    layer table}; the seed decides which values are drawn."""
    draws = torch.Generator().manual_seed(seed)
    inputs = {name: Inputs(name, row["act_elements"] * loader.images, draws) for name, row in layers.items()}
    hooks = [model.get_submodule(name).register_forward_pre_hook(found.add) for name, found in inputs.items()]
    try:
        with evaluation_mode(model):
            for images, _ in loader:
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
