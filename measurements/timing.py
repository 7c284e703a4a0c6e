"""What the benchmarks of training and of the search share. They run in a stage's folder, with its modules on the path."""

import time

from util.exchange import write_atomically
from util.tables import aligned, csv_text


def timed(work):
    """(seconds that a callable takes, what it returns)."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def show(path, columns, rows, digits):
    """Print the rows, {column: value}, as a table, and write them as CSV."""
    print(aligned(columns, rows, digits))
    write_atomically(path, csv_text(columns, rows).encode())
    print(f"table written to {path}")
