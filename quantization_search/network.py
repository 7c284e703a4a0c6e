"""The layers to be searched and the fixed ones, from the table in an indicators file or from the model itself."""

import json
import math
import os
from dataclasses import dataclass

from util.config import describe
from util.errors import UserError, nearest
from util.exchange import fit_names, same_arch, split_arch

DEFAULT_ARCH = "resnet50"
INPUT_SIZE, CLASSES = 224, 1000  # of ImageNet
CIFAR = {"resnet20": (32, 10)}  # networks for smaller images: input size and classes
TABLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tables.json")
LARGEST_COUNT = 10**15
COUNTS = ("groups", "macs_published", "macs_exact", "params", "act_elements")


@dataclass(frozen=True)
class Row:
    """One layer of the table: its weight shape, MACs per image by both counts, weights, and elements of its input.

    signed: {'weight': bool, 'act': bool}, whether the quantizers' ranges have negative values.
    sparsity: share of the weights that are zero, from 0 to 1; None where the table does not say.
    """

    kind: str
    shape: list
    groups: int
    macs_published: int
    macs_exact: int
    params: int
    act_elements: int
    signed: dict | None = None
    sparsity: float | None = None

    @property
    def nonzero(self):
        """Number of weights that are not zero: all of them where the table does not say."""
        return round(self.params * (1 - (self.sparsity or 0)))

    def nonzero_macs(self, count):
        """MACs whose weight is not zero; count is 'published' or 'exact'.

        A layer uses each of its weights equally often. A made-up table may say otherwise; then it is rounded down.
        """
        return getattr(self, f"macs_{count}") * self.nonzero // self.params

    def sparse_size(self, bits):
        """Weight storage in bits: the smaller of dense and one bit per weight plus the non-zeros."""
        return min(self.params * bits, self.params + self.nonzero * bits)


@dataclass(frozen=True)
class SearchSpace:
    """rows: {name: Row} of the layers to be searched, in network order; fixed: {name: Row} of those at 8 bits. products:
    MACs of matrix products that are no layer's, those of attention, which are in full precision and in no BitOPs."""

    arch: str
    rows: dict
    fixed: dict
    non_layer_macs: int = 0

    def all_rows(self):
        return [*self.rows.values(), *self.fixed.values()]

    @property
    def sparse(self):
        """Whether any weight is zero."""
        return any(row.nonzero < row.params for row in self.all_rows())


def find_network(path, indicators, model=None):
    """The network that the indicators file at `path` speaks of.

    Args:
        path: for messages.
        indicators: what read_indicators gives; its table, where there is one, goes before building the model.
        model: the architecture the user named, or None.

    Raises:
        UserError: on a bad table, another architecture, or layers that do not match.
    """
    arch = check_arch(path, indicators, model)
    if "layers" in indicators:
        rows = _checked_rows(path, "layers", indicators["layers"])
        fixed = _checked_rows(path, "fixed", indicators.get("fixed", {}))
    else:
        rows, fixed = _rows_of_model(path, indicators, arch, model), {}
    _rename(indicators, rows)
    names = indicators["layer_name"]
    for name in names:
        if not name.isprintable() or not name:
            raise UserError(f"{path}: layer_name: {name!r} is not a layer name")
        if name not in rows:
            raise UserError(f"{path}: layer_name: {name} is not a layer of {arch}{nearest(name, rows)}")
        if name in fixed:
            raise UserError(f"{path}: fixed: {name} is among the searched layers too")
    others = {name: row for name, row in rows.items() if name not in names}
    if "layers" in indicators and others:
        raise UserError(f"{path}: layers: {next(iter(others))} has no indicators{nearest(next(iter(others)), names)}")
    _check_ends(path, rows, others)
    return SearchSpace(arch, {name: rows[name] for name in names}, fixed | others, _checked_products(path, indicators))


def _rename(indicators, rows):
    """Give the layers of an indicators file that was written elsewhere the names they have in the network, in place."""
    names = fit_names(rows, indicators["layer_name"])
    indicators["layer_name"] = list(names.values())
    for kind in ("weight", "act"):
        indicators[kind] = {names[name]: row for name, row in indicators[kind].items()}


def check_arch(path, indicators, model):
    """The architecture, from the file where it says so; a model named otherwise is an error."""
    arch = indicators.get("arch")
    if arch is None:
        return model or DEFAULT_ARCH
    if not isinstance(arch, str) or not arch or not arch.isprintable():
        raise UserError(f"{path}: arch: found {describe(arch)}, expected the name of a network")
    if model is not None and not same_arch(model, arch):
        raise UserError(f"model: found {model!r}, but the indicators in {path} are those of {arch!r}")
    return arch


def _check_ends(path, rows, others):
    """A model's own layers without indicators can only be the first and the last; a table says itself what is fixed."""
    ends = [next(iter(rows)), next(reversed(rows))]
    for name in others:
        if name not in ends:
            raise UserError(f"{path}: layer_name: no indicators for the layer {name}, which is neither the first layer "
                            "of the network nor the last")


def _rows_of_model(path, indicators, arch, model):
    if model is None and split_arch(arch):  # code is run where the user names it, not where a file does
        raise UserError(f"{path}: arch: is built by a file ({arch}), and the layer table is missing; extract the indicators "
                        "again")
    arch = model or arch
    usual, classes = CIFAR.get(arch, (INPUT_SIZE, CLASSES))
    size = indicators.get("input_size") or usual
    if type(size) is not int or not 1 <= size <= 4096:
        raise UserError(f"{path}: input_size: found {describe(size)}, expected the height and width of an image")
    rows = read_tables().get(arch, {}) if size == usual else {}
    return rows or trace_rows(arch, size, classes, f"{path}: arch" if "arch" in indicators else "model")


def read_tables():
    """{arch: {layer: Row}} of the networks whose tables lie in the repository, at their usual input size."""
    with open(TABLES, encoding="utf-8") as file:
        content = json.load(file)
    return {arch: {name: Row(**dict(zip(content["columns"], values, strict=True))) for name, values in rows.items()}
            for arch, rows in content["networks"].items()}


def trace_rows(arch, size, classes, where="model"):
    """{layer: Row} from the network itself, which takes seconds; `where` its name stands, for messages."""
    from models import create_model  # builds on torch
    from models.layer_table import trace

    try:
        graph = trace(create_model(arch, classes), size)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('arch: ')}") from None
    return {name: Row(**call.as_row()) for name, call in graph.layers.items()}


def _checked_rows(path, key, table):
    if not isinstance(table, dict):
        raise UserError(f"{path}: {key}: expected a table {{layer: row}}, found {describe(table)}")
    rows = {}
    for name, row in table.items():
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise UserError(f"{path}: {key}: {describe(name)} is not a layer name")
        rows[name.removeprefix("module.")] = _checked_row(f"{path}: {key}: {name}", row)
    return rows


def _checked_products(path, indicators):
    """The sum of the MACs of products that are no layer's, as an indicators file gives them by module."""
    products = indicators.get("products", {})
    if not isinstance(products, dict):
        raise UserError(f"{path}: products: expected a table {{module: MACs}}, found {describe(products)}")
    for name, macs in products.items():
        _check_count(f"{path}: products: {describe(name)}", macs)
    return sum(products.values())


def _checked_row(where, row):
    """A Row from a mapping that came from outside."""
    known = Row.__dataclass_fields__
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a row of the layer table, found {describe(row)}")
    for field in row:
        if field not in known:
            raise UserError(f"{where}: {describe(field)} is not a column of the layer table{nearest(field, known)}")
    for field in ("kind", "shape", *COUNTS):
        if field not in row:
            raise UserError(f"{where}: {field} is missing")
    if row["kind"] not in ("conv", "linear"):
        raise UserError(f"{where}: kind: found {describe(row['kind'])}, expected 'conv' or 'linear'")
    for field in COUNTS:
        _check_count(f"{where}: {field}", row[field])
    _check_shape(where, row)
    signed = row.get("signed")
    if signed is not None and (not isinstance(signed, dict) or signed.keys() != {"weight", "act"}
                               or not all(type(value) is bool for value in signed.values())):
        raise UserError(f"{where}: signed: found {describe(signed)}, expected {{'weight': True, 'act': True or False}}")
    sparsity = row.get("sparsity")
    if sparsity is not None and (type(sparsity) not in (int, float) or not 0 <= sparsity <= 1):
        raise UserError(f"{where}: sparsity: found {describe(sparsity)}, expected a share from 0 to 1")
    return Row(**row)


def _check_count(where, value):
    if type(value) is not int or not 0 < value <= LARGEST_COUNT:
        raise UserError(f"{where}: found {describe(value)}, expected a positive whole number")


def _check_shape(where, row):
    shape = row["shape"]
    if not isinstance(shape, (list, tuple)) or not 2 <= len(shape) <= 5:
        raise UserError(f"{where}: shape: found {describe(shape)}, expected the shape of the weight")
    for length in shape:
        _check_count(f"{where}: shape", length)
    if math.prod(shape) != row["params"]:
        raise UserError(f"{where}: params: found {row['params']}, but the shape {list(shape)} has {math.prod(shape)}")
