"""What a search is asked: one schema for the command line and for YAML."""

import contextlib
import os
from dataclasses import dataclass, fields, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

from ilp import FULL_PRECISION_BITS
from util.command import Parser
from util.config import AUTO, check_bits, option
from util.errors import UserError, nearest

DEFAULT_RATIO = 12.2  # LIMPQ's, as are --bops True, --wb 3 and --ab 4
LARGEST_EXPONENT = 18
LARGEST_SEED = 2**63 - 1
MOST_POINTS = 1000
BUDGETS = ("bops_budget", "size_budget", "avg_wb", "avg_ab", "act_mem", "latency_budget")  # those that LIMPQ lacks
SWEPT = {"cr": "cr", "bops": "bops_budget"}
PLOT_ENDINGS = (".png", ".svg")
SHORT_FLAGS = {"indicators": "i", "bits": "b"}  # LIMPQ's
FLAG = {"action": "store_true"}


def truth(text):
    """True, 1, yes or False, 0, no, in any case."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


@dataclass(frozen=True)
class SearchConfig:
    """What a search is made of; the same from the command line and from YAML. Numbers count exactly as they are typed."""

    indicators: str = option("", "indicators, made by importance_extractor.py", required=True, metavar="FILE.pkl")
    model: str | None = option(None, "architecture; by default what the .pkl says, else resnet50")
    bits: list[int] | None = option(None, "candidate bit-widths; by default all in the .pkl", type=int, nargs="+",
                                    metavar="BITS")
    alpha: Literal["auto"] | float | None = option(
        None, "weight of the weights' indicators against the activations'; auto: such that the mean bits of both come closest "
        "(2, as in LIMPQ, for step sizes, and 1 for indicators of one unit)")
    outliers: Literal["erase", "isotonic", "keep"] | None = option(
        None, "indicators that are smaller than with more bits: take such a candidate only where nothing else fits, replace "
        "the layer's by the nearest monotone sequence in least squares, or keep them as they are (erase for step sizes, else "
        "isotonic)",
        choices=("erase", "isotonic", "keep"))
    macs: Literal["published", "exact"] = option(
        "published", "count MACs as LIMPQ published them, or from the true output sizes (published)",
        choices=("published", "exact"))
    fix: dict[str, list[int]] = option({}, "pin the layers that match a pattern such as 'layer1.*' to these bits; repeatable",
                                       action="append", metavar="LAYER=W,A")
    at_least: dict[str, list[int]] = option(
        {}, "the layers that match a pattern have at least these bits; repeatable. Here, in --fix and in --tie, depthwise "
        "stands for all depthwise convolutions", action="append", metavar="LAYER=W,A")
    tie: list[list[str]] = option([], "layers, or patterns, that share their bits; repeatable", action="append", nargs="+",
                                  metavar="LAYER")
    same_bits: bool = option(False, "weights and activations of a layer have the same bits", **FLAG)
    baseline: Literal["random", "reversed", "depth"] | None = option(
        None, "for comparisons: draw a policy at random that uses at least 99%% of each budget, or search after each layer's "
        "indicators were exchanged for those of its mirror rank, or of such a rank that earlier layers have the larger ones",
        choices=("random", "reversed", "depth"))
    seed: int | None = option(None, "of --baseline random (0)", type=int, metavar="N")
    solver: str | None = option(None, "a solver that PuLP finds and that has to be asked; by default HiGHS, where needed")
    time_limit: float = option(60, "seconds for one solution; the best policy found by then, and the gap left (60)",
                               metavar="S")

    cr: float | None = option(None, "compression ratio of the weights against 32 bits; 0: no limit (12.2)")
    bops: bool | None = option(None, "whether the searched layers' BitOPs are held to those of --wb and --ab bits (True)",
                               type=truth, nargs="?", const=True, metavar="BOOL")
    wb: float = option(3, "weight bits of the uniform network whose BitOPs are the budget (3)")
    ab: float = option(4, "activation bits of that network (4); 32: activations are left alone, and the bits of weights are "
                       "searched alone")
    bops_budget: float | None = option(
        None, "BitOPs in 10^9 of the whole network, the fixed layers at 8 x 8 bits included, as the report prints them by the "
        "count of --macs", metavar="G")
    size_budget: float | None = option(
        None, "weights of the whole network, the fixed layers at 8 bits included, in MB of 2^20 bytes, as the report prints "
        "them", metavar="MB")
    sparse_size: bool = option(
        False, "--cr and --size-budget count a layer of a pruned network as the smaller of dense and one bit per weight plus "
        "the non-zeros; --cr is then dense size at 32 bits over this size", **FLAG)
    sparse_bops: bool = option(
        False, "--bops and --bops-budget count only the MACs whose weight is not zero; the limit of --bops stays that of the "
        "dense network at --wb and --ab bits", **FLAG)
    avg_wb: float | None = option(None, "mean weight bits over the searched layers", metavar="BITS")
    avg_ab: float | None = option(None, "mean activation bits over the searched layers", metavar="BITS")
    act_mem: float | None = option(
        None, "activation memory in MB of 2^20 bytes for one image: the input of each layer at its activation bits, the fixed "
        "layers at 8", metavar="MB")
    act_mem_kind: Literal["largest", "summed"] = option(
        "largest", "hold the largest of these inputs to --act-mem, or the sum of them all (largest)",
        choices=("largest", "summed"))
    latency: str | None = option(
        None, "measured times: a header layer,weight_bits,act_bits,ms and a row for each pair; fixed layers count where the "
        "table has them at 8,8", metavar="TABLE.csv")
    latency_budget: float | None = option(None, "sum of these times in ms", metavar="MS")

    output: str | None = option(None, "write the policy here", metavar="POLICY.yaml")
    plot: str | None = option(None, "draw the policy and its indicators, or with --sweep the Pareto frontier",
                              metavar="FILE.png|svg")
    shadow: bool = option(False, "say how much the objective falls for 1%% more of each budget", **FLAG)
    sweep: str | None = option(None, "solve for each value of --cr, or of --bops-budget, in place of the one typed",
                               metavar="cr=LOW:HIGH:STEP | bops=LOW:HIGH:STEP")
    sweep_output: str | None = option(
        None, "the table of the sweep; by default next to --output (which then is not written), else printed",
        metavar="FILE.csv")
    sweep_policies: str | None = option(None, "write the policy of each point here", metavar="FOLDER")

    def __post_init__(self):
        if not self.indicators:
            raise UserError("indicators: the .pkl file of layer-wise indicators is needed")
        for key in ("wb", "ab", "time_limit", *BUDGETS, "cr", "alpha"):
            value, zero_too = None if getattr(self, key) == AUTO else self.number(key), key in ("cr", "alpha")
            if value is not None and (value < 0 or (value == 0 and not zero_too)):
                raise UserError(f"{key}: found {getattr(self, key)}, allowed is {'0 or more' if zero_too else 'above 0'}")
        if self.bits is not None:
            check_bits("bits", self.bits)
        pairs = [(key, *item) for key in ("fix", "at_least") for item in getattr(self, key).items()]
        for key, pattern, pair in pairs:
            if len(pair) != 2:
                raise UserError(f"{key}: {pattern}: found {pair}, expected weight bits and activation bits such as [4, 4]")
        for patterns in self.tie:
            if not patterns:
                raise UserError("tie: found an empty list, expected the names of layers")
        if (self.latency is None) != (self.latency_budget is None):
            raise UserError("latency, latency_budget: the table and the limit in ms belong together")
        if self.plot is not None and os.path.splitext(self.plot)[1].lower() not in PLOT_ENDINGS:
            raise UserError(f"plot: found {self.plot!r}, expected a file ending in .png or .svg")
        for key in ("avg_ab", "act_mem", "same_bits"):
            if self.weights_only and getattr(self, key):
                raise UserError(f"{key}: is about bits of activations, which ab 32 leaves alone")
        self._check_together()
        if not self.sweep and not self.ratio and not self.uniform and not self.newer:
            raise UserError("cr, bops: both constraints are off, and no other budget is given; at least one is needed")

    def _check_together(self):
        """Refuse keys that belong to others, or cannot be had beside them."""
        is_random = self.baseline == "random"
        for key, owner, is_there in (("sweep_output", "sweep", self.sweep), ("sweep_policies", "sweep", self.sweep),
                                     ("seed", "baseline random", is_random)):
            if getattr(self, key) is not None and not is_there:
                raise UserError(f"{key}: belongs to {owner}, which is not given")
        if self.seed is not None and not 0 <= self.seed <= LARGEST_SEED:
            raise UserError(f"seed: found {str(self.seed)[:40]}, allowed is 0 to {LARGEST_SEED}")
        for other, is_there in (("sweep", self.sweep), ("baseline random", is_random)):
            if self.shadow and is_there:
                raise UserError(f"shadow: cannot be had together with {other}")
        if self.sweep:
            self.points()

    @property
    def weights_only(self):
        """Whether activations are left alone."""
        return exact("ab", self.ab) == FULL_PRECISION_BITS

    @property
    def newer(self):
        """Whether a budget is given that LIMPQ lacks, which turns cr and bops off unless they are typed."""
        return any(getattr(self, key) is not None for key in BUDGETS)

    @property
    def ratio(self):
        """The compression ratio asked for, as a Fraction; 0 where there is none."""
        typed = (0 if self.newer else DEFAULT_RATIO) if self.cr is None else self.cr
        return exact("cr", typed)

    @property
    def uniform(self):
        """Whether BitOPs are held to those of wb and ab bits everywhere."""
        return not self.newer if self.bops is None else self.bops

    @property
    def frontier(self):
        """The file that the table of a sweep goes to; None where it is printed, or there is no sweep."""
        beside = f"{os.path.splitext(self.output)[0]}_frontier.csv" if self.sweep and self.output else None
        return beside if self.sweep_output is None else self.sweep_output

    def idle(self):
        """{key: why} of the keys that nothing reads in such a search."""
        if self.sweep:
            swept = SWEPT[self.sweep.partition("=")[0]]
            return {**self.points()[0][1].idle(), swept: "sweep"}
        reasons = {"wb": (self.uniform, "bops is off"), "ab": (self.uniform, "bops is off"),
                   "act_mem_kind": (self.act_mem is not None, "no act_mem"),
                   "sparse_size": (self.ratio or self.size_budget is not None, "neither cr nor size_budget"),
                   "sparse_bops": (self.uniform or self.bops_budget is not None, "neither bops nor bops_budget")}
        return {key: why for key, (is_read, why) in reasons.items() if not is_read}

    def number(self, key):
        """An option as it was typed, as a Fraction, or None."""
        typed = getattr(self, key)
        return None if typed is None else exact(key, typed)

    def points(self):
        """[(value as text, the configuration with that value)] of the sweep."""
        key, equals, values = self.sweep.partition("=")
        parts = values.split(":")
        if not equals or key not in SWEPT or len(parts) != 3:
            raise UserError(f"sweep: found {self.sweep!r}, expected cr=LOW:HIGH:STEP or bops=LOW:HIGH:STEP"
                            + ("" if key in SWEPT else nearest(key, SWEPT)))
        low, high, step = (Decimal(str(part)) if exact("sweep", part) > 0 else None for part in parts)
        if None in (low, high, step) or high < low:
            raise UserError(f"sweep: found {values}, expected numbers above 0, the first no larger than the second")
        if (high - low) / step >= MOST_POINTS:
            raise UserError(f"sweep: found {values}, which is more than {MOST_POINTS} points")
        texts = [f"{low + i * step:f}" for i in range(int((high - low) / step) + 1)]
        return [(text, replace(self, sweep=None, sweep_output=None, sweep_policies=None, **{SWEPT[key]: text}))
                for text in texts]


def exact(key, value):
    """The number as it was typed, as a Fraction: 12.2 is 61/5."""
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise UserError(f"{key}: found {str(value)!r}, expected a number") from None
    if not number.is_finite() or (number and abs(number.adjusted()) > LARGEST_EXPONENT):
        raise UserError(f"{key}: found {str(value)[:40]}, expected a number of ordinary size")
    return Fraction(number)


def parse_arguments(description, arguments=None):
    """LIMPQ's flags, and those that came later, as a SearchConfig."""
    parser = Parser(description=description)
    groups = {"cr": parser.add_argument_group("budgets", "Any of these together. Once one that LIMPQ lacks is given "
                                              "(all but --cr and --bops), --cr and --bops are off unless typed."),
              "output": parser.add_argument_group("output")}
    group = parser
    for item in fields(SearchConfig):
        group = groups.get(item.name, group)  # which begins with this field
        group.add_argument(_flag(item.name), dest=item.name, default=None, **item.metadata)
    typed = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    for key in ("fix", "at_least"):
        typed[key] = _pairs_by_pattern(key, typed.get(key, []))
    return SearchConfig(**typed)


@contextlib.contextmanager
def flags_for_keys():
    """Let a UserError raised within, where it begins with keys, begin with the flags of these."""
    try:
        yield
    except UserError as error:
        begun, colon, rest = str(error).partition(":")
        keys = begun.split(", ")
        if not {*keys} <= {item.name for item in fields(SearchConfig)}:
            raise
        raise type(error)(f"{', '.join(map(_flag, keys))}{colon}{rest}") from None


def _flag(key):
    return f"--{SHORT_FLAGS.get(key, key.replace('_', '-'))}"


def _pairs_by_pattern(key, words):
    """{pattern: [w, a]} from LAYER=W,A."""
    pairs = {}
    for word in words:
        pattern, equals, pair = word.rpartition("=")
        bits = pair.split(",")
        if not equals or not pattern or len(bits) != 2 or not all(bit.strip().isdecimal() for bit in bits):
            raise UserError(f"{_flag(key)}: found {word!r}, expected a layer and its bits such as layer1.0.conv1=4,4")
        bits = [int(bit) for bit in bits]
        if pairs.setdefault(pattern, bits) != bits:
            raise UserError(f"{_flag(key)}: {pattern} is given {pairs[pattern]} and {bits}")
    return pairs
