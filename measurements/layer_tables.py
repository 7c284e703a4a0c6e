"""Write tables.json, the layer tables of built-in networks, so that a search needs no torch.

In quantization_search: python ../measurements/layer_tables.py
"""

import json
import sys

sys.path.insert(0, ".")  # the search

from network import CIFAR, CLASSES, INPUT_SIZE, TABLES, trace_rows
from util.exchange import write_atomically

NETWORKS = ("resnet18", "resnet50", "mobilenetv1", "resnet20")
COLUMNS = ("kind", "shape", "groups", "macs_published", "macs_exact", "params", "act_elements")


def build(arch):
    """{layer: [values in the order of COLUMNS]} at the network's usual input size."""
    rows = trace_rows(arch, *CIFAR.get(arch, (INPUT_SIZE, CLASSES)))
    return {name: [getattr(row, column) for column in COLUMNS] for name, row in rows.items()}


def render():
    """The text of tables.json, one layer a line."""
    networks = ",\n".join(
        f'{json.dumps(arch)}: {{\n' + ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}"
                                                 for name, values in build(arch).items()) + "}" for arch in NETWORKS)
    return f'{{"columns": {json.dumps(COLUMNS)},\n"networks": {{\n{networks}}}}}\n'


if __name__ == "__main__":
    write_atomically(TABLES, render().encode())
