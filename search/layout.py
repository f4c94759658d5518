"""Text in columns, and numbers in few characters."""

from collections.abc import Sequence

UNITS = ("B", "kB", "MB", "GB")


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
    """A fraction in percent, of four digits; one that float64 has no number for is more than the largest."""
    return "over 1e308 %" if fraction > 1e306 else f"{100 * fraction:.4g} %"


def size(nbytes: float) -> str:
    """Bytes in the unit that leaves up to three digits before the point, or in GB."""
    power = next((power for power in range(3) if nbytes < 999.95 * 1000**power), 3)
    count = nbytes / 1000**power
    return f"{count:,.4g} {UNITS[power]}" if count < 999.95 else f"{count:,.0f} {UNITS[power]}"
