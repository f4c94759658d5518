"""Text in columns, and numbers in few characters."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Rows of cells, the headings first, as aligned lines.

    The first `left` columns stand to the left, and so do names, which have no heading.
    """
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(size) if number < left or not heading else cell.rjust(size)
            for number, (cell, heading, size) in enumerate(zip(row, rows[0], sizes, strict=True))
        ).rstrip()
        for row in rows
    ]


def percent(fraction: float) -> str:
    """A fraction in percent, of four digits."""
    return f"{100 * fraction:.4g} %"


def megabytes(nbytes: float) -> str:
    """Bytes in units of 10^6, of four digits or more."""
    return f"{nbytes / 1e6:,.2f}" if nbytes >= 1e7 else f"{nbytes / 1e6:.4g}"
