"""From what was asked to the constraints, pins and ties of the integer program."""

import csv
import itertools

import ilp
from ilp import pairs_of
from options import exact
from util.config import decode_text, describe, read_bytes
from util.errors import UserError, nearest
from util.exchange import stands_for

LATENCY_COLUMNS = ["layer", "weight_bits", "act_bits", "ms"]
LARGEST_TABLE = 64 * 2**20  # bytes
NO_FLOOR = (0, 0)
FIXED_PAIR = (ilp.FIXED_BITS, ilp.FIXED_BITS)


def make_constraints(config, layers, bits, network, allowed):
    """Every budget that is on, as a list of ilp.Constraint; `allowed` as find_allowed gives it."""
    fixed = network.fixed.values()
    fixed_params = sum(row.params for row in fixed)
    fixed_macs = sum(getattr(row, f"macs_{config.macs}") for row in fixed)
    constraints = []
    if config.ratio:
        constraints.append(ilp.size_constraint(layers, bits, fixed_params, config.ratio))
    if config.uniform:
        constraints.append(ilp.bitops_constraint(layers, bits, config.number("wb"), config.number("ab")))
    if config.size_budget is not None:
        constraints.append(ilp.size_budget(layers, bits, fixed_params, config.number("size_budget")))
    if config.bops_budget is not None:
        constraints.append(ilp.bitops_budget(layers, bits, fixed_macs, config.number("bops_budget")))
    for kind, key in (("weight", "avg_wb"), ("act", "avg_ab")):
        if getattr(config, key) is not None:
            constraints.append(ilp.mean_bits_budget(layers, bits, kind, config.number(key)))
    if config.act_mem is not None:
        constraints.append(ilp.memory_budget([row.act_elements for row in network.rows.values()],
                                             [row.act_elements for row in fixed], bits, config.act_mem_kind,
                                             config.number("act_mem")))
    if config.latency_budget is not None:
        constraints.append(ilp.latency_budget(*find_times(config.latency, network, pairs_of(bits), allowed),
                                              config.number("latency_budget")))
    return [_counted(config, constraint, network, pairs_of(bits)) for constraint in constraints]


def _counted(config, constraint, network, pairs):
    """The constraint with sparse sizes or non-zero MACs held to its limit, where these are asked for."""
    rows, fixed = network.rows.values(), network.fixed.values()
    if config.sparse_size and constraint.key in ("cr", "size_budget"):
        return constraint.counting(f"sparse {constraint.name}", [[row.sparse_size(w) for w, _ in pairs] for row in rows],
                                   sum(row.sparse_size(ilp.FIXED_BITS) for row in fixed))
    if config.sparse_bops and constraint.key in ("bops", "bops_budget"):
        counted = fixed if constraint.key == "bops_budget" else ()  # --bops is about the searched layers alone
        return constraint.counting(f"effective {constraint.name}",
                                   [[row.nonzero_macs(config.macs) * w * a for w, a in pairs] for row in rows],
                                   sum(row.nonzero_macs(config.macs) * ilp.FIXED_BITS**2 for row in counted))
    return constraint


def check_sparsity(config, network):
    """Sparse sizes and non-zero MACs need a table that says what is zero."""
    for key in ("sparse_size", "sparse_bops"):
        if getattr(config, key) and all(row.sparsity is None for row in network.all_rows()):
            raise UserError(f"{key}: {config.indicators} says nothing of sparsity; expected a layer table with a column "
                            "sparsity")


def find_allowed(config, network, bits):
    """For each layer the indices of the pairs it may take under fix, at_least and same_bits."""
    pairs = pairs_of(bits)
    pins, floors = _pinned(config.fix, network, bits), _floors(config.at_least, network)
    allowed = []
    for name in network.rows:
        allowed.append([index for index, (w, a) in enumerate(pairs)
                        if (name not in pins or (w, a) == pins[name][1]) and (w == a or not config.same_bits)
                        and w >= floors[name][0] and a >= floors[name][1]])
        if not allowed[-1] and floors[name] != NO_FLOOR:
            pinned = f", and {pins[name][0]} pins it to {_written(pins[name][1])}" if name in pins else ""
            raise UserError(f"at_least: {name} has to have {_written(floors[name])}, of the candidates "
                            f"{' '.join(map(str, sorted({*itertools.chain(*pairs)})))}{pinned}")
        if not allowed[-1]:
            pattern, pair = pins[name]
            raise UserError(f"fix: {pattern} pins {name} to {_written(pair)}, but same_bits asks for equal bits")
    return allowed


def find_groups(config, network, bits, allowed):
    """Groups of layer indices that share their bits, as ilp.Problem has them."""
    names = list(network.rows)
    ties = []
    for patterns in config.tie:
        ties.append({names.index(name) for pattern in patterns for name in matching("tie", pattern, network)})
        if len(ties[-1]) == 1:
            raise UserError(f"tie: {' '.join(patterns)} names one layer, {names[min(ties[-1])]}; expected at least two")
    groups = ilp.join(len(names), ties)
    pairs = pairs_of(bits)
    for group in groups:
        if not set(allowed[group[0]]).intersection(*(allowed[layer] for layer in group)):
            pinned = {pairs[allowed[layer][0]]: names[layer] for layer in group if len(allowed[layer]) == 1}
            if len(pinned) < 2:
                tied = ", ".join(names[layer] for layer in group)
                raise UserError(f"tie: {tied} share their bits, but by fix and at_least no pair is allowed for all of them")
            (one, first), (other, second) = list(pinned.items())[:2]
            raise UserError(f"tie: {first} and {second} share their bits, but are pinned to {_written(one)} and to "
                            f"{_written(other)}")
    return groups


def _pinned(fix, network, bits):
    """{layer: (pattern, (w, a))}."""
    pins = {}
    for pattern, pair in fix.items():
        for bit, candidates in zip(pair, zip(*pairs_of(bits), strict=True), strict=True):
            if bit not in candidates:
                raise UserError(f"fix: {pattern}: {bit} is not among the candidates "
                                f"{' '.join(map(str, dict.fromkeys(candidates)))}")
        for name in matching("fix", pattern, network):
            other, before = pins.setdefault(name, (pattern, tuple(pair)))
            if before != tuple(pair):
                raise UserError(f"fix: {name} is pinned to {_written(before)} by {other} and to {_written(pair)} by {pattern}")
    return pins


def _floors(at_least, network):
    """{layer: (least weight bits, least activation bits)} of all layers."""
    floors = dict.fromkeys(network.rows, NO_FLOOR)
    for pattern, pair in at_least.items():
        for name in matching("at_least", pattern, network):
            floors[name] = tuple(map(max, floors[name], pair))
    return floors


def _written(pair):
    return f"{pair[0]},{pair[1]}"


def matching(key, pattern, network):
    """The searched layers that a pattern stands for."""
    pattern = pattern.removeprefix("module.")
    found, held = ([name for name, row in rows.items() if stands_for(pattern, name, row.shape, row.groups)]
                   for rows in (network.rows, network.fixed))
    if not found and held:
        raise UserError(f"{key}: {held[0]} is held at {ilp.FIXED_BITS} bits and is not searched")
    if not found:
        raise UserError(f"{key}: {pattern} matches no layer{nearest(pattern, network.rows)}")
    return found


def find_times(path, network, pairs, allowed):
    """Times in ms: ([layer][pair] of the searched layers, 0 for pairs that may not be taken; the sum over the fixed ones)."""
    table = read_latency(path, network)
    times = []
    for name, indices in zip(network.rows, allowed, strict=True):
        for index in indices:
            if (name, *pairs[index]) not in table:
                raise UserError(f"{path}: the row {name},{_written(pairs[index])} is missing")
        times.append([table[name, *pair] if index in indices else 0 for index, pair in enumerate(pairs)])
    fixed = {name: table.get((name, *FIXED_PAIR)) for name in network.fixed}
    missing = [name for name, time in fixed.items() if time is None]
    if missing and len(missing) < len(fixed):
        raise UserError(f"{path}: the row {missing[0]},{_written(FIXED_PAIR)} is missing; other fixed layers have theirs")
    return times, 0 if missing else sum(fixed.values())


def read_latency(path, network):
    """{(layer, weight bits, activation bits): ms as a Fraction} from a CSV file with a header."""
    text = decode_text(read_bytes(path, "the table", LARGEST_TABLE), path)
    try:
        lines = list(csv.reader(text.splitlines()))
    except csv.Error as error:
        raise UserError(f"{path}: cannot read the table ({error})") from None
    if not lines or [word.strip() for word in lines[0]] != LATENCY_COLUMNS:
        raise UserError(f"{path}: line 1: expected the header {','.join(LATENCY_COLUMNS)}, separated by commas, found "
                        f"{describe(','.join(lines[0]) if lines else '')}")
    table = {}
    for number, words in enumerate(lines[1:], 2):
        if words:
            _add_latency(table, f"{path}: line {number}", [word.strip() for word in words], network)
    return table


def _add_latency(table, where, words, network):
    if len(words) != len(LATENCY_COLUMNS) or not (words[1].isdecimal() and words[2].isdecimal()):
        raise UserError(f"{where}: expected a layer, two bit-widths and a time, found {describe(','.join(words))}")
    name = words[0].removeprefix("module.")
    if name not in network.rows and name not in network.fixed:
        raise UserError(f"{where}: {name} is not a layer of {network.arch}{nearest(name, [*network.rows, *network.fixed])}")
    milliseconds = exact(f"{where}: ms", words[3])
    if milliseconds < 0:
        raise UserError(f"{where}: ms: found {words[3]}, expected 0 or more")
    key = (name, int(words[1]), int(words[2]))
    if table.setdefault(key, milliseconds) is not milliseconds:
        raise UserError(f"{where}: {name},{_written(key[1:])} stands twice")
