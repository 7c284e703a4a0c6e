"""One search: the indicators file and its network, the problem that a configuration asks for, and its solution."""

import operator
from dataclasses import dataclass, replace
from fractions import Fraction

import ilp
import report
from baselines import NoneDrawn, by_depth, draw, mirrored
from budgets import check_sparsity, find_allowed, find_groups, make_constraints
from network import SearchSpace, find_network
from options import BUDGETS
from solver import SolverError
from util.config import AUTO, check_bits
from util.errors import UserError
from util.exchange import STEPS, read_indicators, usual_alpha

EXCHANGED = {"reversed": mirrored, "depth": by_depth}
USUAL_ALPHAS, MOST_ALPHA, ALPHA_SOLUTIONS = (-12, 12), 56, 16  # powers of two


@dataclass(frozen=True)
class Study:
    """What all budgets share: network, candidates (descending), layers, and how the indicators file says it was made."""

    network: SearchSpace
    bits: list
    layers: list
    trained: object = None
    kind: str = STEPS  # of indicators

    @staticmethod
    def read(config):
        indicators = read_indicators(config.indicators)
        bits = find_candidates(config, indicators)
        network = find_network(config.indicators, indicators, config.model)
        check_sparsity(config, network)
        acts = dict.fromkeys(network.rows, {ilp.FULL_PRECISION_BITS: 0}) if config.weights_only else indicators["act"]
        layers = [ilp.Layer(name, indicators["weight"][name], acts[name],
                            getattr(row, f"macs_{config.macs}"), row.params) for name, row in network.rows.items()]
        if config.baseline in EXCHANGED:
            layers = EXCHANGED[config.baseline](layers, bits)
        return Study(network, bits, layers, indicators.get("trained"), indicators.get("kind", STEPS))

    def settled(self, config):
        """The configuration with alpha and outliers decided, as what was typed or the kind of the indicators says."""
        alpha = usual_alpha(self.kind) if config.alpha is None else config.alpha
        config = replace(config, alpha=alpha, outliers=self.outliers(config))
        return replace(config, alpha=self._balancing_alpha(config)) if alpha == AUTO else config

    def outliers(self, config):
        """The rule for outliers, typed or that of the kind."""
        return config.outliers or ("erase" if self.kind == STEPS else "isotonic")

    def _balancing_alpha(self, config):
        """The alpha at which the mean bits of weights and of activations come closest, as text; more alpha, more bits of
        weights."""
        if config.weights_only or config.baseline == "random":
            return "1"
        found = self._tried_alphas(config, *USUAL_ALPHAS)
        best = min(found)
        if best[0] and len({is_more for *_, is_more in found}) == 1:  # units that are further apart
            low, high = USUAL_ALPHAS
            best = min(best, *self._tried_alphas(config, *((-MOST_ALPHA, low) if found[0][-1] else (high, MOST_ALPHA))),
                       key=operator.itemgetter(0))
        return best[2]

    def _tried_alphas(self, config, low, high):
        """[(difference of the sums of bits, alpha, the same as text, whether weights have more)] of a bisection."""
        found = []
        for _ in range(ALPHA_SOLUTIONS):
            text = f"{2 ** ((low + high) / 2):.4g}"
            solution = solve(self.problem(replace(config, alpha=text)), config)
            difference = sum(solution.weight_bits) - sum(solution.act_bits)
            found.append((abs(difference), Fraction(text), text, difference > 0))
            if not difference:
                break
            low, high = (low, (low + high) / 2) if difference > 0 else ((low + high) / 2, high)
        return found

    def problem(self, config):
        """The integer program that the configuration asks for."""
        config = self.settled(config)
        bits = (self.bits, [ilp.FULL_PRECISION_BITS]) if config.weights_only else self.bits
        allowed = find_allowed(config, self.network, bits)
        return ilp.make_problem(
            self.layers, bits, config.number("alpha"),
            make_constraints(config, self.layers, bits, self.network, allowed), config.outliers, allowed,
            find_groups(config, self.network, bits, allowed))


def find_candidates(config, indicators):
    """The candidates in descending order; each layer has to have an indicator of each, where bits of its kind are searched."""
    tables = [(kind, indicators[kind]) for kind in (["weight"] if config.weights_only else ["weight", "act"])]
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


def solve(problem, config):
    """The solution, or a policy drawn at random where that is asked, or a UserError that says what stands in the way."""
    given = [key.replace("_", "-") for key in ("fix", "at_least", "tie", "same_bits") if getattr(config, key)]
    pinned = f"; with {', '.join(given)} as given" if given else ""
    try:
        if config.baseline == "random":
            return draw(problem, config.seed or 0)
        return ilp.solve(problem, config.solver, float(config.number("time_limit")))
    except ilp.Infeasible as error:
        why = report.describe_conflict(error.conflict, error.together)
        raise Impossible(f"infeasible: {error}; {why}{pinned}") from None
    except NoneDrawn as error:
        raise Impossible(f"baseline: {error}{pinned}") from None
    except SolverError as error:
        raise UserError(f"solver: {error}") from None


class Impossible(UserError):
    """The budgets cannot be kept together, or no policy drawn at random uses enough of them."""


def make_policy(config, study, problem, solution, costs):
    """The policy file: lists aligned with layer_name, then what was asked and what it costs."""
    policy = {"arch": study.network.arch, "layer_name": problem.names,
              "weight_bits": solution.weight_bits, "act_bits": solution.act_bits}
    signed = [row.signed["act"] for row in study.network.rows.values() if row.signed is not None]
    if len(signed) == len(problem.names):
        policy["act_signed"] = signed
    return policy | {"candidates": study.bits, "alpha": plain(config.alpha), "constraints": _asked(config),
                     "cost": costs.as_plain(), "penalty": plain(solution.penalty),
                     "objective": float(solution.objective), "optimal": solution.optimal}


def _asked(config):
    asked = {"cr": plain(config.ratio), "bops": config.uniform, "wb": plain(config.wb), "ab": plain(config.ab),
             "macs": config.macs}
    asked |= {key: plain(getattr(config, key)) for key in BUDGETS if getattr(config, key) is not None}
    if config.act_mem is not None:
        asked["act_mem_kind"] = config.act_mem_kind
    kept = ("sparse_size", "sparse_bops", "latency", "fix", "at_least", "tie", "same_bits")
    asked |= {key: getattr(config, key) for key in kept if getattr(config, key)}
    if config.outliers != "erase":
        asked["outliers"] = config.outliers
    if config.baseline:
        asked["baseline"] = config.baseline
    if config.baseline == "random":
        asked["seed"] = config.seed or 0
    return asked


def plain(number):
    number = Fraction(str(number))
    return int(number) if number.denominator == 1 else float(number)
