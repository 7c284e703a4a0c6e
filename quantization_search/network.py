"""The layers to be searched and the fixed ones, from the table in an indicators file or from the model itself."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from util.config import describe
from util.errors import UserError, naming, nearest
from util.exchange import fit_names, same_arch, split_arch

DEFAULT_ARCH = "resnet50"
INPUT_SIZE, CLASSES = 224, 1000  # of ImageNet
CIFAR = {"resnet20": (32, 10)}  # networks for smaller images: input size and classes
TABLES = Path(__file__).with_name("tables.json")
LARGEST_COUNT = 10**15


@dataclass(frozen=True)
class Row:
    """One layer of the table: its weight shape, MACs per image by both counts, weights, and elements of its input.

    signed: {'weight': bool, 'act': bool}, whether the quantization ranges have negative values; None: unknown.
    sparsity: share of the weights that are zero, from 0 to 1; None: unknown.
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
        """Number of weights that are not zero: all of them where the sparsity is unknown."""
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
    """rows: {name: Row} of the layers to be searched, in network order; fixed: {name: Row} of those at 8 bits.
    non_layer_macs: of matrix products such as those of attention, which are in full precision and in no BitOPs."""

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
    """The SearchSpace of the network that the indicators file at `path` speaks of.

    Args:
        indicators: what read_indicators gives; its table, where there is one, spares building the model. Its layers get, in
            place, the names that they have in the network.
        model: the architecture the user named, or None.

    Raises:
        UserError: on a bad table, another architecture, or layers that do not match.
    """
    arch = check_arch(path, indicators, model)
    rows = None if "layers" in indicators else _rows_of_model(path, indicators, arch, model)
    with naming(path):
        fixed = {} if rows else _checked_rows("fixed", indicators.get("fixed", {}))
        rows = rows or _checked_rows("layers", indicators["layers"])
        names = fit_names(rows, indicators["layer_name"])
        indicators["layer_name"] = list(names.values())
        for kind in ("weight", "act"):
            indicators[kind] = {names[name]: row for name, row in indicators[kind].items()}
        others = _check_names(indicators, arch, rows, fixed)
        products = indicators.get("products", {})
        if not isinstance(products, dict):
            raise UserError(f"products: expected a table {{module: MACs}}, found {describe(products)}")
        for name, macs in products.items():
            if not is_count(macs):
                raise UserError(f"products: {describe(name)}: found {describe(macs)}, expected a positive whole number")
    searched = {name: rows[name] for name in indicators["layer_name"]}
    return SearchSpace(arch, searched, fixed | others, sum(products.values()))


def check_arch(path, indicators, model):
    """The architecture, from the file where it says so; a model named otherwise is an error."""
    arch = indicators.get("arch")
    if arch is None:
        return model or DEFAULT_ARCH
    if not is_layer_name(arch):
        raise UserError(f"{path}: arch: found {describe(arch)}, expected the name of a network")
    if model is not None and not same_arch(model, arch):
        raise UserError(f"model: found {model!r}, but the indicators in {path} are those of {arch!r}")
    return arch


def _check_names(indicators, arch, rows, fixed):
    """{name: Row} of the layers without indicators. They are a model's own first and last one; a table lists them as fixed."""
    names = indicators["layer_name"]
    for name in names:
        if not is_layer_name(name):
            raise UserError(f"layer_name: {name!r} is not a layer name")
        if name not in rows:
            raise UserError(f"layer_name: {name} is not a layer of {arch}{nearest(name, rows)}")
        if name in fixed:
            raise UserError(f"fixed: {name} is among the searched layers too")
    others = {name: row for name, row in rows.items() if name not in names}
    for name in others:
        if "layers" in indicators:
            raise UserError(f"layers: {name} has no indicators{nearest(name, names)}")
        if name not in (next(iter(rows)), next(reversed(rows))):
            raise UserError(f"layer_name: no indicators for the layer {name}, which is neither the first layer of the network "
                            "nor the last")
    return others


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
    content = json.loads(TABLES.read_text(encoding="utf-8"))
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


def is_layer_name(value):
    return isinstance(value, str) and value.isprintable() and value != ""


def is_count(value):
    return type(value) is int and 0 < value <= LARGEST_COUNT


def is_signed(value):
    return value is None or (isinstance(value, dict) and value.keys() == {"weight", "act"}
                             and all(type(signed) is bool for signed in value.values()))


COLUMNS = {"kind": (lambda value: value in ("conv", "linear"), "'conv' or 'linear'"),
           "shape": (lambda value: isinstance(value, (list, tuple)) and 2 <= len(value) <= 5, "the shape of the weight"),
           **dict.fromkeys(("groups", "macs_published", "macs_exact", "params", "act_elements"),
                           (is_count, "a positive whole number")),
           "signed": (is_signed, "{'weight': True, 'act': True or False}"),
           "sparsity": (lambda value: value is None or (type(value) in (int, float) and 0 <= value <= 1),
                        "a share from 0 to 1")}


def _checked_rows(key, table):
    if not isinstance(table, dict):
        raise UserError(f"{key}: expected a table {{layer: row}}, found {describe(table)}")
    rows = {}
    for name, row in table.items():
        if not is_layer_name(name):
            raise UserError(f"{key}: {describe(name)} is not a layer name")
        with naming(f"{key}: {name}"):
            rows[name.removeprefix("module.")] = _checked_row(row)
    return rows


def _checked_row(row):
    """A Row from a mapping that came from outside."""
    if not isinstance(row, dict):
        raise UserError(f"expected a row of the layer table, found {describe(row)}")
    for column in row:
        if column not in COLUMNS:
            raise UserError(f"{describe(column)} is not a column of the layer table{nearest(column, COLUMNS)}")
    for column, (fits, wanted) in COLUMNS.items():
        if column not in row and column not in ("signed", "sparsity"):
            raise UserError(f"{column} is missing")
        if column in row and not fits(row[column]):
            raise UserError(f"{column}: found {describe(row[column])}, expected {wanted}")
    for length in row["shape"]:
        if not is_count(length):
            raise UserError(f"shape: found {describe(length)}, expected a positive whole number")
    if math.prod(row["shape"]) != row["params"]:
        raise UserError(f"params: found {row['params']}, but the shape {list(row['shape'])} has {math.prod(row['shape'])}")
    return Row(**row)
