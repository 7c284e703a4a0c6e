"""How much a jointly trained network loses where a single weight or input has fewer bits."""

from engine.metrics import evaluate
from engine.resume import find_run, restore
from engine.run_folder import RunFolder
from indicators import CARRIED, trained
from network import build_network
from util.data_loader import create_loaders, describe_data
from util.errors import UserError


def measure(config, images, device):
    """The content of an indicators file, with losses for indicators: of the joint training that `config` evaluates, over so
    many training images without augmentation, over all where there are fewer."""
    folder = RunFolder.of(config)
    found = find_run(config, folder)
    num_classes, input_size = describe_data(config.dataloader)
    network = build_network(config, num_classes, input_size, found, device)
    restore(found, network.model, None, network.config)
    loader = create_loaders(config.dataloader, config.seed, 0, 1, device, evaluation_only=True).calibration(images)
    print("\n".join(filter(None, [network.remark, f"{found.path}: losses over {loader.images} training images"])))
    facts = {**network.metadata, "arch": config.arch}
    made = trained(found.content["config"]) if found.content.get("config") else {}
    return {**losses(network.model, network.switch, list(loader)), "layer_name": list(network.switch.layers),
            **{key: facts[key] for key in CARRIED}, "trained": made}


def losses(model, switch, batches):
    """What one layer at fewer bits does to the loss.

    Args:
        model: the jointly trained network.
        switch: its BitSwitch.
        batches: [(images [batch, 3, height, width], target [batch])].

    Returns:
        {"weight": {layer: {bit: loss}}, "act": the same}: the mean cross-entropy with the weight, or the input, of that layer
        at `bit` bits and everything else at the highest bit-width, the BatchNorm after it too: its copy for `bit` has the
        statistics of a network whose every layer is at `bit` bits.
    """
    highest = max(switch.bits)
    switch.uniform(highest)
    best = evaluate(model, batches)["loss"]

    def loss(name, bit, kind):
        if bit == highest:
            return best
        switch.uniform(highest)
        switch.layers[name].select(*((bit, highest) if kind == "weight" else (highest, bit)))
        found = evaluate(model, batches)["loss"]
        if not found > 0:
            raise UserError(f"{name}: the loss with its {kind} at {bit} bits is {found}, expected a positive number")
        return found

    return {kind: {name: {bit: loss(name, bit, kind) for bit in switch.bits} for name in switch.layers}
            for kind in ("weight", "act")}
