"""Rows of a table, {column: value}, as text: CSV, and aligned columns for the terminal."""

import csv
import io


def csv_text(columns, rows):
    """The rows as CSV under a line of the columns' names; what a row lacks stays empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def aligned(columns, rows, digits):
    """The rows in aligned columns under their names, with so many digits after the point."""
    cells = [columns, *([row.get(key, "") for key in columns] for row in rows)]
    cells = [[f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell) for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
