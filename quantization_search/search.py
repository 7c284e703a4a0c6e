"""Find the bit-widths of every layer: least importance cost under budgets on size and BitOPs.

python search.py --model resnet50 --i FILE.pkl --b 6 5 4 3 2 --wb 3 --ab 4 --cr 12.2 --bops True --output policy.yaml
"""

import os
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

import ilp
import report
from network import find_network
from util.command import Parser
from util.config import check_bits
from util.errors import UserError, nearest, user_errors_on_one_line
from util.exchange import read_indicators, write_policy

LARGEST_EXPONENT = 18


@dataclass(frozen=True)
class SearchConfig:
    """What a search is made of; the same from the command line and from YAML. Budgets of 0 and false are off.

    indicators: the .pkl of stage 1. model: by default what the .pkl says, else resnet50. bits: candidates, by default
    all in the .pkl. cr: full-precision size over searched size. bops: whether BitOPs are held to those of wb and ab
    bits in every layer. alpha: weight of the weights' indicators. macs: which count of MACs. solver: the name in PuLP
    of a solver that has to be asked; by default HiGHS, where it is needed. output: the policy file.
    """

    indicators: str = ""
    model: str | None = None
    bits: list[int] | None = None
    wb: float = 3
    ab: float = 4
    cr: float = 12.2
    bops: bool = True
    alpha: float = 2
    macs: Literal["published", "exact"] = "published"
    solver: str | None = None
    output: str | None = None

    def __post_init__(self):
        if not self.indicators:
            raise UserError("indicators: the .pkl file of layer-wise indicators is needed")
        for key, positive in (("wb", True), ("ab", True), ("cr", False), ("alpha", False)):
            typed = getattr(self, key)
            value = exact(key, typed)
            if value < 0 or (positive and value == 0):
                raise UserError(f"{key}: found {typed}, allowed is {'above 0' if positive else '0 or more'}")
        if self.bits is not None:
            check_bits("bits", self.bits)
        if not self.bops and exact("cr", self.cr) == 0:
            raise UserError("cr, bops: both constraints are off; at least one has to be on")


def exact(key, value):
    """The number as it was typed, as a Fraction: 12.2 is 61/5."""
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise UserError(f"{key}: found {str(value)!r}, expected a number") from None
    if not number.is_finite() or (number and abs(number.adjusted()) > LARGEST_EXPONENT):
        raise UserError(f"{key}: found {str(value)[:40]}, expected a number of ordinary size")
    return Fraction(number)


def main(arguments=None):
    run(parse_arguments(arguments))


def run(config):
    """Search, print the report and, where asked, write the policy file."""
    check_output(config)
    check_solver(config.solver)
    indicators = read_indicators(config.indicators)
    bits = find_candidates(config, indicators)
    network = find_network(config.indicators, indicators, config.model)
    layers = make_layers(indicators, network, config.macs)
    problem = ilp.make_problem(layers, bits, exact("alpha", config.alpha),
                               make_constraints(config, layers, bits, network))
    report.print_indicators(layers, bits)
    solution = solve(problem, config)
    costs = report.Costs(network, solution)
    report.print_solution(problem, solution, costs, config.solver)
    if config.output:
        write_policy(config.output, make_policy(config, network, bits, problem, solution, costs))
        print(f"policy written to {config.output}")
    print(f"searched weight bit-widths {solution.weight_bits}")
    print(f"searched act bit-widths {solution.act_bits}")


def find_candidates(config, indicators):
    """The candidates in descending order; each layer has to have an indicator of each, for weights and activations."""
    tables = [("weight", indicators["weight"]), ("act", indicators["act"])]
    rows = [row for _, table in tables for row in table.values()]
    bits = sorted(config.bits or set(rows[0]).intersection(*rows), reverse=True)
    for kind, table in tables:
        for name, row in table.items():
            for bit in bits:
                if bit not in row:
                    raise UserError(f"bits: {bit} is not in {config.indicators}: {kind}: {name} has "
                                    f"{' '.join(map(str, sorted(row, reverse=True)))}")
    check_bits("bits", bits)
    return bits


def make_layers(indicators, network, macs):
    return [ilp.Layer(name, indicators["weight"][name], indicators["act"][name], getattr(row, f"macs_{macs}"),
                      row.params) for name, row in network.rows.items()]


def make_constraints(config, layers, bits, network):
    constraints = []
    if exact("cr", config.cr) > 0:
        fixed_params = sum(row.params for row in network.fixed.values())
        constraints.append(ilp.size_constraint(layers, bits, fixed_params, exact("cr", config.cr)))
    if config.bops:
        constraints.append(ilp.bitops_constraint(layers, bits, exact("wb", config.wb), exact("ab", config.ab)))
    return constraints


def solve(problem, config):
    from solver import SolverError

    try:
        return ilp.solve(problem, config.solver)
    except ilp.Infeasible as error:
        raise UserError(f"infeasible: {error}; {report.describe_conflict(error.conflict)}") from None
    except SolverError as error:
        raise UserError(f"solver: {error}") from None


def make_policy(config, network, bits, problem, solution, costs):
    """The policy file: lists aligned with layer_name, then what was asked and what it costs."""
    policy = {"arch": network.arch, "layer_name": problem.names,
              "weight_bits": solution.weight_bits, "act_bits": solution.act_bits}
    signed = [row.signed["act"] for row in network.rows.values() if row.signed is not None]
    if len(signed) == len(problem.names):
        policy["act_signed"] = signed
    asked = {"cr": plain(config.cr), "bops": config.bops, "wb": plain(config.wb), "ab": plain(config.ab),
             "macs": config.macs}
    return policy | {"candidates": bits, "alpha": plain(config.alpha), "constraints": asked, "cost": costs.as_plain(),
                     "penalty": plain(solution.penalty), "objective": float(solution.objective),
                     "optimal": solution.optimal}


def plain(number):
    number = Fraction(str(number))
    return int(number) if number.denominator == 1 else float(number)


def check_output(config):
    """Refuse what cannot be written before the work starts."""
    if not config.output:
        return
    folder = os.path.dirname(os.path.abspath(config.output))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if os.path.isdir(config.output) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"output: {config.output} cannot be written; expected a file in a folder that is writable")
    if os.path.exists(config.output) and os.path.exists(config.indicators) \
            and os.path.samefile(config.output, config.indicators):
        raise UserError(f"output: {config.output} is the indicators file itself")


def check_solver(name):
    if name is None:
        return
    import pulp

    available = pulp.listSolvers(onlyAvailable=True)
    if name not in available:
        raise UserError(f"solver: {name!r} is not available; PuLP finds {', '.join(available)}"
                        + nearest(name, available))


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


def parse_arguments(arguments=None):
    """LIMPQ's flags, and those that came later, as a SearchConfig."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", help="architecture; by default what the .pkl says, else resnet50")
    parser.add_argument("--i", required=True, metavar="FILE.pkl", help="indicators, made by importance_extractor.py")
    parser.add_argument("--b", type=int, nargs="+", metavar="BITS",
                        help="candidate bit-widths; by default all in the .pkl")
    parser.add_argument("--wb", default="3", help="weight bits of the uniform network whose BitOPs are the budget (3)")
    parser.add_argument("--ab", default="4", help="activation bits of that network (4)")
    parser.add_argument("--cr", default="12.2",
                        help="compression ratio of the weights against 32 bits; 0: no limit (12.2)")
    parser.add_argument("--bops", type=truth, nargs="?", const=True, default=True, metavar="BOOL",
                        help="whether BitOPs are limited (True)")
    parser.add_argument("--alpha", default="2", help="weight of the weights' indicators against the activations' (2)")
    parser.add_argument("--macs", choices=("published", "exact"), default="published",
                        help="count MACs as LIMPQ published them, or from the true output sizes")
    parser.add_argument("--solver",
                        help="a solver that PuLP finds and that has to be asked; by default HiGHS, where needed")
    parser.add_argument("--output", metavar="POLICY.yaml", help="write the policy here")
    options = parser.parse_args(arguments)
    try:
        return SearchConfig(options.i, options.model, options.b, options.wb, options.ab, options.cr, options.bops,
                            options.alpha, options.macs, options.solver, options.output)
    except UserError as error:  # raised by __post_init__, whose messages begin with the key
        raise UserError(f"--{error}") from None


def truth(text):
    """True, 1, yes or False, 0, no, in any case."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
