"""Refine a policy by what the jointly trained network does at it, or rank policies so, without fine-tuning any.

python refine.py CONFIG.yaml [MORE.yaml ...] [dotted.key=value ...] --policy POLICY.yaml [POLICY.yaml ...]
                 [--i FILE.pkl --output REFINED.yaml] [--images N] [--tries N]

A policy is judged by the mean KL divergence, in nats, of the network's outputs from those with everything at the highest
bit-width, over training images, with the BatchNorm statistics re-estimated at the policy.

The search adds up what single layers cost; here all of them act together. With --i and --output, one weight or input gets the
next higher bit-width and others the next lower one, within the budgets of the policy. Of such swaps, the --tries that cost
least by the indicators are tried; the first that lowers the divergence is taken, by more than other images might undo: twice
the standard error of the difference. It ends where none of them does.
"""

from util.errors import user_errors_on_one_line  # first, for Ctrl-C

# isort: split

import math

import torch

from engine.metrics import calibrate_batchnorm, evaluation_mode
from engine.passes import prepare_alone
from joint_sensitivity import kl_divergences, load_trained
from quan.cost import FIXED_BIT, FLOAT_BIT, MB, sparse_size
from quan.func import KINDS
from quan.utils import weights_quantized_once
from schema import IndicatorsConfig
from swaps import Swaps, budgets_of, floors_of, held
from util import distributed
from util.command import Parser, add_configuration, split_configuration
from util.config import describe, load_config
from util.errors import UserError, nearest, reason
from util.exchange import (
    STEPS,
    check_outputs,
    fit_names,
    read_indicators,
    read_policy,
    same_arch,
    usual_alpha,
    write_policy,
)

IMAGES, TRIES = 1000, 20
CLEAR = 2  # standard errors


def main(arguments=None):
    options, configs, overrides = parse_arguments(arguments)
    config = load_config(IndicatorsConfig, configs, [*overrides, "eval=true"])
    check_outputs([("--output", options.output, "policies")],
                  [*configs, options.i, *options.policy, config.init_from, config.pre_trained, config.resume.path])
    with distributed.process_group(config.training_device) as device:
        prepare_alone(config, "refine.py", device)
        policies = {path: read_policy(path) for path in options.policy}
        indicators = read_indicators(options.i) if options.i else None
        if indicators and not same_arch(indicators.get("arch", config.arch), config.arch):
            raise UserError(f"--i: {options.i} is of {describe(indicators['arch'])}, but arch is {config.arch}")
        judge = Judge(config, options.images, device)
        choices = {path: choice_of(policy, path, judge.layers, judge.arch, judge.bits) for path, policy in policies.items()}
        if options.output:
            [(path, policy)] = policies.items()
            write_policy(options.output, refined(judge, policy, choices[path], path, indicators,
                                                 options.tries or TRIES))
            print(f"policy written to {options.output}")
        else:
            rank(judge, choices)


def parse_arguments(arguments):
    """(options, paths of YAML files, "key=value" strings)."""
    parser = Parser(description=__doc__)
    add_configuration(parser)
    parser.add_argument("--policy", nargs="+", required=True, metavar="POLICY.yaml", help="what to refine, or to rank")
    parser.add_argument("--i", metavar="FILE.pkl", help="indicators by which swaps are ordered")
    parser.add_argument("--output", metavar="REFINED.yaml", help="where the refined policy goes")
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"training images (default {IMAGES})")
    parser.add_argument("--tries", type=int, metavar="N",
                        help=f"swaps that are tried before it ends (default {TRIES})")
    options = parser.parse_intermixed_args(arguments)
    for flag in ("images", "tries"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise UserError(f"--{flag}: found {getattr(options, flag)}, allowed is at least 1")
    if bool(options.i) != bool(options.output):
        raise UserError("--i, --output: go together; without both, policies are only ranked")
    if options.tries is not None and not options.output:
        raise UserError("--tries: belongs to --i and --output, which refine; without both, policies are only ranked")
    if options.output and options.images == 1:
        raise UserError("--images: found 1 image; a gain is compared with how much images differ, so give more")
    if options.output and len(options.policy) > 1:
        raise UserError(f"--policy: found {len(options.policy)} policies, of which one can be refined; leave out --output to "
                        "rank them")
    return options, *split_configuration(options.words)


class Judge:
    """The jointly trained network of a configuration, and how far its outputs move at a policy.

    Attributes:
        arch, bits: of the network. layers, fixed: {layer: row of the layer table}, searched and not.
    """

    def __init__(self, config, images, device):
        found, network, self.batches, self.images = load_trained(config, "KL divergence", images, device)
        self.model, self.switch = network.model, network.switch
        self.path, self.arch, self.bits = found.path, config.arch, sorted(network.switch.bits)
        self.layers, self.fixed = network.description["layers"], network.description["fixed"]
        self.switch.uniform(self.bits[-1])
        self.best = self._outputs()
        if not all(logits.isfinite().all() for logits in self.best):
            raise UserError(f"{found.path}: the outputs at the highest bit-width are not finite")

    @torch.no_grad()
    def _outputs(self):
        with evaluation_mode(self.model), weights_quantized_once(self.model):
            return [self.model(images) for images, _ in self.batches]

    def divergences(self, choice):
        """KL divergence of each image, [images], at a choice, {(kind, layer): bit}, with re-estimated BatchNorm statistics."""
        self.switch.policy(*({name: choice[kind, name] for name in self.layers} for kind in KINDS))
        calibrate_batchnorm(self.model, self.batches)
        return torch.cat([kl_divergences(*pair) for pair in zip(self._outputs(), self.best, strict=True)])


def choice_of(policy, path, layers, arch, bits):
    """{(kind, layer): bit} of a policy file.

    Raises:
        UserError: where it is one of another network, or asks for a bit-width that was not trained.
    """
    if not same_arch(policy.get("arch", arch), arch):
        raise UserError(f"{path}: the policy is for {policy['arch']}, but arch is {arch}")
    fitted = fit_names(layers, policy["layer_name"])
    names = [fitted[name] for name in policy["layer_name"]]
    for name in [*(name for name in names if name not in layers), *(name for name in layers if name not in names)]:
        raise UserError(f"{path}: {name} is a layer of the policy or of the network, but not of both{nearest(name, layers)}")
    choice = {}
    for kind in KINDS:
        for name, bit in zip(names, policy[f"{kind}_bits"], strict=True):
            if bit not in bits:
                raise UserError(f"{path}: {kind}_bits: {name} has {bit} bits, but the network was trained at {bits}")
            choice[kind, name] = bit
    return choice


def rank(judge, choices):
    """Print the divergence and the cost of each policy, the least divergence first."""
    found = [(judge.divergences(choice).mean().item(), path) for path, choice in choices.items()]
    found.sort(key=lambda row: (math.isnan(row[0]), *row))  # last what gives outputs that are not finite
    print(f"{'KL':>8} {'GBitOPs':>9} {'MB':>8}  policy")
    for divergence, path in found:
        cost = cost_of(choices[path], judge.layers, judge.fixed)
        print(f"{divergence:8.4f} {cost['bitops_published'] / 1e9:9.4f} {cost['size_mb']:8.4f}  {path}")


def swaps_of(judge, policy, choice, path, indicators):
    """(the Swaps within what a policy was searched under, the costs that order them)."""
    try:
        candidates = policy.get("candidates", judge.bits)
        bits = [bit for bit in judge.bits if bit in candidates or bit in choice.values()]
        alpha = float(policy.get("alpha", usual_alpha(indicators.get("kind", STEPS))))
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha is {alpha}")
        limits = (budgets_of(policy, judge.layers, judge.fixed, choice, path), held(policy, judge.layers),
                  floors_of(policy, judge.layers))
    except UserError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:  # of a section that was edited
        raise UserError(f"{path}: candidates, alpha, constraints: not as the search writes them ({reason(error)})") from None
    costs = costs_of(indicators, judge.layers, bits, alpha)
    return Swaps(judge.layers, costs, *limits), costs


def refined(judge, policy, choice, path, indicators, tries):
    """The content of the policy file that swaps lead to."""
    swaps, costs = swaps_of(judge, policy, choice, path, indicators)
    least = judge.divergences(choice)
    before = least.mean().item()
    print(f"{path}: KL {before:.4f}")
    known, taken, improved = {tuple(choice.values())}, 0, True
    while improved:
        improved = False
        untried = [changes for _, changes in swaps.find(choice) if tuple({**choice, **changes}.values()) not in known]
        for changes in untried[:tries]:
            changed = {**choice, **changes}
            known.add(tuple(changed.values()))
            found = judge.divergences(changed)
            if is_clearly_less(found, least):
                taken, improved = taken + 1, True
                moves = ", ".join(f"{name} {kind} {choice[kind, name]} to {bit}" for (kind, name), bit in changes.items())
                print(f"swap {taken}: KL {found.mean():.4f}; {moves}", flush=True)
                choice, least = changed, found
                break
    print(f"{taken} swaps, {len(known)} policies tried: KL {before:.4f} to {least.mean():.4f}")
    bits = {f"{kind}_bits": [choice[kind, name] for name in judge.layers] for kind in KINDS}
    signs = dict(zip(policy["layer_name"], policy.get("act_signed") or [], strict=False))
    signed = {"act_signed": [signs[name] for name in judge.layers]} if signs.keys() == judge.layers.keys() else {}
    rest = {key: value for key, value in policy.items() if key not in ("penalty", "optimal", "act_signed")}
    return {**rest, "layer_name": list(judge.layers), **bits, **signed, "cost": cost_of(choice, judge.layers, judge.fixed),
            "objective": float(sum(costs[key][bit] for key, bit in choice.items())), "optimal": False,
            "refined": {"swaps": taken, "kl_before": before, "kl": least.mean().item(), "images": judge.images}}


def is_clearly_less(found, least):
    """Whether the mean of one value per image is less than that of others, by more than CLEAR standard errors of the mean of
    their differences."""
    differences = least - found
    return bool(len(differences) > 1 and differences.mean() > CLEAR * differences.std(correction=0) / len(differences) ** 0.5)


def costs_of(indicators, layers, bits, alpha):
    """{(kind, layer): {bit: cost}} of indicators, those of weights times alpha, made so that no cost grows with the bits."""
    alpha = {"weight": alpha, "act": 1}
    fitted, costs = fit_names(layers, indicators["layer_name"]), {}
    names = {fitted[name]: name for name in indicators["layer_name"]}
    for kind in KINDS:
        for layer in layers:
            row = indicators[kind].get(names.get(layer), {})
            missing = [bit for bit in bits if bit not in row]
            if layer not in names:
                raise UserError(f"--i: has no indicators of {layer}; it is a file of another network")
            if missing:
                raise UserError(f"--i: has no indicator of {layer} ({kind}) at {missing[0]} bits")
            largest, costs[kind, layer] = row[bits[-1]], {}
            for bit in reversed(bits):
                largest = max(largest, row[bit])
                costs[kind, layer][bit] = alpha[kind] * largest
    return costs


def cost_of(choice, layers, fixed):
    """Size and BitOPs of the whole network, under the names that a policy file has them under."""
    rows = [*((row, choice["weight", name], choice["act", name]) for name, row in layers.items()),
            *((row, FIXED_BIT, FIXED_BIT) for row in fixed.values())]
    size, full = sum(row["params"] * w for row, w, _ in rows), FLOAT_BIT * sum(row["params"] for row, _, _ in rows)
    means = {f"mean_{kind}_bits": sum(choice[kind, name] for name in layers) / len(layers) for kind in KINDS}
    cost = {"size_mb": size / MB, "compression_ratio": full / size,
            **{f"bitops_{count}": sum(row[f"macs_{count}"] * w * a for row, w, a in rows) for count in ("published", "exact")},
            **means}
    if not any(row.get("sparsity") for row, _, _ in rows):
        return cost
    left = [round(row["params"] * (1 - (row.get("sparsity") or 0))) for row, _, _ in rows]
    sparse = sum(sparse_size(row["params"], count, w) for (row, w, _), count in zip(rows, left, strict=True))
    params = sum(row["params"] for row, _, _ in rows)
    return {**cost, "sparsity": 1 - sum(left) / params, "sparse_size_mb": sparse / MB,
            "sparse_compression_ratio": full / sparse,
            **{f"effective_bitops_{count}": sum(row[f"macs_{count}"] * kept // row["params"] * w * a
                                                for (row, w, a), kept in zip(rows, left, strict=True))
               for count in ("published", "exact")}}


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
