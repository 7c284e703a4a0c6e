"""What a search is asked: one schema for the command line and for YAML."""

import os
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

from ilp import FULL_PRECISION_BITS
from util.command import Parser
from util.config import check_bits
from util.errors import UserError, nearest

DEFAULT_RATIO = 12.2  # LIMPQ's, as are --bops True, --wb 3 and --ab 4
LARGEST_EXPONENT = 18
LARGEST_SEED = 2**63 - 1
MOST_POINTS = 1000
BUDGETS = ("bops_budget", "size_budget", "avg_wb", "avg_ab", "act_mem", "latency_budget")  # those that LIMPQ lacks
SWEPT = {"cr": "cr", "bops": "bops_budget"}
PLOT_ENDINGS = (".png", ".svg")


@dataclass(frozen=True)
class SearchConfig:
    """What a search is made of; the same from the command line and from YAML.

    indicators: the .pkl of stage 1. model: by default what the .pkl says, else resnet50. bits: candidates, by default
    all in the .pkl. alpha: weight of the weights' indicators. outliers: what happens to indicators that are smaller than
    with more bits. macs: which count of MACs.

    Budgets: cr, full-precision size over searched size, 0 for none; bops, whether the BitOPs of the searched layers are
    held to those of wb and ab bits in every layer. With ab 32 the bits of weights are searched and activations are left
    alone; their indicators then count for nothing. Both are on by default, and off by default where another budget is
    given: bops_budget (G) and size_budget (MB) of the whole network, fixed layers included; avg_wb and avg_ab, mean bits
    over the searched layers; act_mem (MB), the inputs of the layers at their bits, the largest or summed; latency_budget
    (ms) with the table in latency. sparse_size: cr and size_budget count sparse sizes; sparse_bops: bops and bops_budget
    count MACs with non-zero weights, held to the same limit. fix: {pattern: [w, a]}; tie: lists of patterns whose layers
    share bits; same_bits: w = a in each layer.

    baseline: what to compare a search with: a policy drawn at "random" with the seed (0), at least 99% of each budget in
    use, or the search with the indicators "reversed", each layer's exchanged for those of its mirror rank.

    shadow: also solve with 1% more of each budget. sweep: "cr=LOW:HIGH:STEP" or "bops=LOW:HIGH:STEP".
    time_limit: seconds for one solution. solver: the name in PuLP of a solver that has to be asked; by default HiGHS,
    where it is needed. output: the policy file.
    """

    indicators: str = ""
    model: str | None = None
    bits: list[int] | None = None
    wb: float = 3
    ab: float = 4
    cr: float | None = None
    bops: bool | None = None
    alpha: float = 2
    outliers: Literal["erase", "isotonic", "keep"] = "erase"
    macs: Literal["published", "exact"] = "published"
    bops_budget: float | None = None
    size_budget: float | None = None
    avg_wb: float | None = None
    avg_ab: float | None = None
    act_mem: float | None = None
    act_mem_kind: Literal["largest", "summed"] = "largest"
    latency: str | None = None
    latency_budget: float | None = None
    sparse_size: bool = False
    sparse_bops: bool = False
    fix: dict[str, list[int]] = field(default_factory=dict)
    tie: list[list[str]] = field(default_factory=list)
    same_bits: bool = False
    baseline: Literal["random", "reversed"] | None = None
    seed: int | None = None
    shadow: bool = False
    sweep: str | None = None
    sweep_output: str | None = None
    sweep_policies: str | None = None
    plot: str | None = None
    time_limit: float = 60
    solver: str | None = None
    output: str | None = None

    def __post_init__(self):
        if not self.indicators:
            raise UserError("indicators: the .pkl file of layer-wise indicators is needed")
        for key in ("wb", "ab", "time_limit", *BUDGETS):
            self._check_number(key, positive=True)
        for key in ("cr", "alpha"):
            self._check_number(key, positive=False)
        if self.bits is not None:
            check_bits("bits", self.bits)
        for pattern, pair in self.fix.items():
            if len(pair) != 2:
                raise UserError(f"fix: {pattern}: found {pair}, expected weight bits and activation bits such as [4, 4]")
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
        self._check_sweep()
        self._check_baseline()
        if not self.sweep and not self.ratio and not self.uniform and not self.newer:
            raise UserError("cr, bops: both constraints are off, and no other budget is given; at least one is needed")

    def _check_number(self, key, positive):
        typed = getattr(self, key)
        if typed is not None:
            value = exact(key, typed)
            if value < 0 or (positive and value == 0):
                raise UserError(f"{key}: found {typed}, allowed is {'above 0' if positive else '0 or more'}")

    def _check_sweep(self):
        for key in ("sweep_output", "sweep_policies"):
            if getattr(self, key) and not self.sweep:
                raise UserError(f"{key}: belongs to sweep, which is not given")
        if self.sweep:
            if self.shadow:
                raise UserError("shadow: cannot be had together with sweep")
            self.points()

    def _check_baseline(self):
        if self.seed is not None:
            if self.baseline != "random":
                raise UserError("seed: belongs to baseline random, which is not given")
            if not 0 <= self.seed <= LARGEST_SEED:
                raise UserError(f"seed: found {str(self.seed)[:40]}, allowed is 0 to {LARGEST_SEED}")
        if self.shadow and self.baseline == "random":
            raise UserError("shadow: cannot be had together with baseline random")

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

    def idle(self):
        """{key: why} of the keys that nothing reads in such a search."""
        if self.sweep:
            swept = SWEPT[self.sweep.partition("=")[0]]
            return {**self.points()[0][1].idle(), swept: "sweep"}
        idle = {} if self.uniform else {"wb": "bops is off", "ab": "bops is off"}
        if self.act_mem is None:
            idle["act_mem_kind"] = "no act_mem"
        if not self.ratio and self.size_budget is None:
            idle["sparse_size"] = "neither cr nor size_budget"
        if not self.uniform and self.bops_budget is None:
            idle["sparse_bops"] = "neither bops nor bops_budget"
        return idle

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
                            + nearest(key, SWEPT))
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


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


def parse_arguments(description, arguments=None):
    """LIMPQ's flags, and those that came later, as a SearchConfig."""
    parser = Parser(description=description)
    _add_search(parser)
    _add_budgets(parser.add_argument_group("budgets", "Any of these together. Once one that LIMPQ lacks is given "
                                           "(all but --cr and --bops), --cr and --bops are off unless typed."))
    _add_outputs(parser.add_argument_group("output"))
    typed = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    typed["fix"] = _pins(typed.get("fix", []))
    try:
        return SearchConfig(**typed)
    except UserError as error:  # raised by __post_init__, whose messages begin with the key
        key, colon, rest = str(error).partition(":")
        flag = {"bits": "b", "indicators": "i"}.get(key, key.replace("_", "-"))
        raise UserError(f"--{flag}{colon}{rest}") from None


def _add_search(parser):
    parser.add_argument("--model", help="architecture; by default what the .pkl says, else resnet50")
    parser.add_argument("--i", required=True, dest="indicators", metavar="FILE.pkl",
                        help="indicators, made by importance_extractor.py")
    parser.add_argument("--b", type=int, nargs="+", dest="bits", metavar="BITS",
                        help="candidate bit-widths; by default all in the .pkl")
    parser.add_argument("--alpha", help="weight of the weights' indicators against the activations' (2)")
    parser.add_argument("--outliers", choices=("erase", "isotonic", "keep"),
                        help="indicators that are smaller than with more bits: take such a candidate only where nothing "
                             "else fits, replace the layer's by the nearest monotone sequence in least squares, or keep "
                             "them as they are (erase)")
    parser.add_argument("--macs", choices=("published", "exact"),
                        help="count MACs as LIMPQ published them, or from the true output sizes (published)")
    parser.add_argument("--fix", action="append", metavar="LAYER=W,A",
                        help="pin the layers that match a pattern such as 'layer1.*' to these bits; repeatable")
    parser.add_argument("--tie", action="append", nargs="+", metavar="LAYER",
                        help="layers, or patterns, that share their bits; repeatable")
    parser.add_argument("--same-bits", action="store_true", default=None,
                        help="weights and activations of a layer have the same bits")
    parser.add_argument("--baseline", choices=("random", "reversed"),
                        help="for comparisons: draw a policy at random that uses at least 99%% of each budget, or search "
                             "after each layer's indicators were exchanged for those of its mirror rank")
    parser.add_argument("--seed", type=int, metavar="N", help="of --baseline random (0)")
    parser.add_argument("--solver",
                        help="a solver that PuLP finds and that has to be asked; by default HiGHS, where needed")
    parser.add_argument("--time-limit", metavar="S",
                        help="seconds for one solution; the best policy found by then, and the gap left (60)")


def _add_budgets(parser):
    parser.add_argument("--cr", help="compression ratio of the weights against 32 bits; 0: no limit (12.2)")
    parser.add_argument("--bops", type=truth, nargs="?", const=True, metavar="BOOL",
                        help="whether the searched layers' BitOPs are held to those of --wb and --ab bits (True)")
    parser.add_argument("--wb", help="weight bits of the uniform network whose BitOPs are the budget (3)")
    parser.add_argument("--ab", help="activation bits of that network (4); 32: activations are left alone, "
                        "and the bits of weights are searched alone")
    parser.add_argument("--bops-budget", metavar="G", help="BitOPs in 10^9 of the whole network, the fixed layers at 8 x 8 "
                        "bits included, as the report prints them by the count of --macs")
    parser.add_argument("--size-budget", metavar="MB", help="weights of the whole network, the fixed layers at 8 bits "
                        "included, in MB of 2^20 bytes, as the report prints them")
    parser.add_argument("--sparse-size", action="store_true", default=None,
                        help="--cr and --size-budget count a layer of a pruned network as the smaller of dense and one bit "
                             "per weight plus the non-zeros; --cr is then dense size at 32 bits over this size")
    parser.add_argument("--sparse-bops", action="store_true", default=None,
                        help="--bops and --bops-budget count only the MACs whose weight is not zero; the limit of --bops "
                             "stays that of the dense network at --wb and --ab bits")
    parser.add_argument("--avg-wb", metavar="BITS", help="mean weight bits over the searched layers")
    parser.add_argument("--avg-ab", metavar="BITS", help="mean activation bits over the searched layers")
    parser.add_argument("--act-mem", metavar="MB", help="activation memory in MB of 2^20 bytes for one image: the input of "
                        "each layer at its activation bits, the fixed layers at 8")
    parser.add_argument("--act-mem-kind", choices=("largest", "summed"),
                        help="hold the largest of these inputs to --act-mem, or the sum of them all (largest)")
    parser.add_argument("--latency", metavar="TABLE.csv", help="measured times: a header layer,weight_bits,act_bits,ms and "
                        "a row for each pair; fixed layers count where the table has them at 8,8")
    parser.add_argument("--latency-budget", metavar="MS", help="sum of these times in ms")


def _add_outputs(parser):
    parser.add_argument("--output", metavar="POLICY.yaml", help="write the policy here")
    parser.add_argument("--plot", metavar="FILE.png|svg",
                        help="draw the policy and its indicators, or with --sweep the frontier")
    parser.add_argument("--shadow", action="store_true", default=None,
                        help="say how much the objective falls for 1%% more of each budget")
    parser.add_argument("--sweep", metavar="cr=LOW:HIGH:STEP | bops=LOW:HIGH:STEP",
                        help="solve for each value of --cr, or of --bops-budget, in place of the one typed")
    parser.add_argument("--sweep-output", metavar="FILE.csv",
                        help="the table of the sweep; by default next to --output (which then is not written), else printed")
    parser.add_argument("--sweep-policies", metavar="FOLDER", help="write the policy of each point here")


def _pins(words):
    """{pattern: [w, a]} from LAYER=W,A."""
    pins = {}
    for word in words:
        pattern, equals, pair = word.rpartition("=")
        bits = pair.split(",")
        if not equals or not pattern or len(bits) != 2 or not all(bit.strip().isdecimal() for bit in bits):
            raise UserError(f"--fix: found {word!r}, expected a layer and its bits such as layer1.0.conv1=4,4")
        bits = [int(bit) for bit in bits]
        if pins.setdefault(pattern, bits) != bits:
            raise UserError(f"--fix: {pattern} is pinned to {pins[pattern]} and to {bits}")
    return pins


def truth(text):
    """True, 1, yes or False, 0, no, in any case."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]
