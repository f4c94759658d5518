"""Other ways to choose bit widths within a budget, beside the exact one: their objective and their time, nothing else.

    python benchmarks/search_baselines.py [runs/one/adapt_logs/search_0.json ...] [--bits 3 4 5]

Each takes the tables of a search and a budget of bits a value. A rule with a knob gets every setting of it that keeps
the budget, and the one with the least error counts: no rule is worse here than with the knob that its authors had. The
tables are those of ResNet-50's gradients, as `search.py` makes them, and of searches' files; without any, of one that a
short training on the handwritten digits writes.
"""

import argparse
import functools
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.accuracy import RECIPES, command_of
from benchmarks.search import accumulated_gradients, machine, measure_model, seconds
from image_classification.models import build
from search import Tables, load_search, within_budget
from search.tables import Floats, Ints, Measure

LEVELS = 10_000  # of L-GreCo's discretized errors, as published
HALVINGS = 200  # of a price in float64: more than there are different ones between any two
ROUNDS = 100  # of k-means, which ends where no layer moves

Baseline = Callable[[Tables, float], tuple[int, ...]]


def discretized(tables: Tables, bits_a_value: float, levels: int = LEVELS) -> tuple[int, ...]:
    """L-GreCo's dynamic program (Alimohammadi et al. 2023, arXiv:2210.17357): fewest bytes for each discretized error.

    Errors count in `levels` steps of the largest one that is of interest. At first that is the error of the best
    uniform width within the budget, or of the cheapest assignment, and then of what was found, for as long as it falls.
    """
    uniform_KL = np.repeat(np.arange(len(tables.widths))[:, None], len(tables.layers), axis=1)
    best_L = _best_of(list(uniform_KL), tables, bits_a_value)
    while True:
        found_L = _best_of([best_L, _fewest_bytes(tables, bits_a_value, best_L, levels)], tables, bits_a_value)
        if tables.totals(found_L)[0] >= tables.totals(best_L)[0]:
            return tables.bits(best_L)
        best_L = found_L


def _fewest_bytes(tables: Tables, bits_a_value: float, largest_L: Ints, levels: int) -> Ints:
    """Columns of the least discretized error whose fewest bytes the budget holds; errors count from each layer's least.

    Layer by layer, over the total so far. `largest_L`: columns whose error is the largest of interest.
    """
    rows = np.arange(len(tables.layers))
    error_LK = tables.error - tables.error.min(axis=1, keepdims=True)
    largest = error_LK[rows, largest_L].sum()
    if largest == 0:
        return largest_L
    # Rounding adds at most half a step a layer.
    size = levels + len(rows) + 1
    step_LK = np.rint(np.minimum(error_LK / largest * levels, size)).astype(np.int64)
    nbytes_D = np.full(size, np.inf)
    nbytes_D[0] = 0
    column_LD = np.zeros((len(rows), size), dtype=np.int8)
    for layer in rows:
        options_KD = np.full((len(tables.widths), size), np.inf)
        for column, step in enumerate(step_LK[layer]):
            options_KD[column, step:] = nbytes_D[: size - step] + tables.nbytes[layer, column]
        column_LD[layer] = options_KD.argmin(axis=0)
        nbytes_D = options_KD.min(axis=0)
    at = int(np.flatnonzero(_fits(tables, nbytes_D, bits_a_value))[0])
    columns_L: Ints = np.zeros(len(rows), dtype=np.int64)
    for layer in rows[::-1]:
        columns_L[layer] = column_LD[layer, at]
        at -= int(step_LK[layer, columns_L[layer]])
    return columns_L


def linear_in_size(tables: Tables, bits_a_value: float) -> tuple[int, ...]:
    """Widths that fall in a straight line with the logarithm of a layer's size; the line's height is the knob."""
    size_L = _scaled(np.log(tables.numel))
    return tables.bits(_best_of(_shifted(tables, size_L * (len(tables.widths) - 1)), tables, bits_a_value))


def clustered(tables: Tables, bits_a_value: float) -> tuple[int, ...]:
    """K-means on layers' sizes and norms, as CGX has it (Markov et al. 2022, arXiv:2111.08617): a width for a cluster.

    Small layers of large norms get most bits. Tables hold no norm of a layer: its error at the least width, which
    grows with the norm, stands for it. The number of clusters and the width of the first one are the knobs.
    """
    size_L, norm_L = (_scaled(np.log(of_L)) for of_L in (tables.numel, np.maximum(np.abs(tables.error[:, 0]), 1e-300)))
    proposed: list[Ints] = []
    for count in range(1, min(len(tables.widths), len(size_L)) + 1):
        cluster_L = _clusters(np.stack([size_L, norm_L], axis=1), size_L - norm_L, count)
        proposed += _shifted(tables, cluster_L.astype(np.float64))
    return tables.bits(_best_of(proposed, tables, bits_a_value))


def priced(tables: Tables, bits_a_value: float) -> tuple[int, ...]:
    """Lagrangian bisection: the least price of a byte at which layers, each deciding for itself, keep the budget."""
    _cheapest(tables, bits_a_value)
    error_LK = tables.error - tables.error.min(axis=1, keepdims=True)

    def at(price: float) -> Ints:
        columns_L: Ints = (error_LK + price * tables.nbytes).argmin(axis=1)
        return columns_L

    # Bytes are whole: at twice the largest error a byte, none is worth its price.
    low, high = 0.0, 2 * float(error_LK.max()) or 1.0
    for _ in range(HALVINGS):
        price = (low * high) ** 0.5 if low else high * 1e-18
        low, high = (low, price) if _fits(tables, tables.totals(at(price))[1], bits_a_value) else (price, high)
    return tables.bits(_best_of([at(0.0), at(high)], tables, bits_a_value))


def greedy(tables: Tables, bits_a_value: float) -> tuple[int, ...]:
    """From the cheapest assignment, one layer after the other to where a byte gains most, while the budget holds."""
    columns_L = _cheapest(tables, bits_a_value)
    rows = np.arange(len(tables.layers))
    while True:
        gained_LK = tables.error[rows, columns_L][:, None] - tables.error
        paid_LK = tables.nbytes - tables.nbytes[rows, columns_L][:, None]
        total = tables.totals(columns_L)[1]
        possible_LK = (gained_LK > 0) & _fits(tables, total + paid_LK, bits_a_value)
        if not possible_LK.any():
            return tables.bits(columns_L)
        with np.errstate(divide="ignore", invalid="ignore"):
            worth_LK = np.where(paid_LK > 0, gained_LK / paid_LK, np.inf)
        layer, column = divmod(int(np.where(possible_LK, worth_LK, -1).argmax()), len(tables.widths))
        columns_L[layer] = column


BASELINES: Mapping[str, Baseline] = {
    "L-GreCo": discretized,
    "linear in size": linear_in_size,
    "k-means": clustered,
    "Lagrangian": priced,
    "greedy": greedy,
}


def _fits(tables: Tables, nbytes: NDArray, bits_a_value: float) -> NDArray[np.bool_]:
    """Whether these bytes are within the budget."""
    fits: NDArray[np.bool_] = 8 * nbytes / sum(tables.numel) <= bits_a_value
    return fits


def _cheapest(tables: Tables, bits_a_value: float) -> Ints:
    """The columns of fewest bytes, of equals with the least error. Raises ValueError where these are too many."""
    columns_L: Ints = np.lexsort((tables.error, tables.nbytes), axis=-1)[:, 0]
    if not _fits(tables, tables.totals(columns_L)[1], bits_a_value):
        cheapest = tables.bits_a_value(tables.bits(columns_L))
        raise ValueError(
            f"a budget must hold the cheapest assignment, {cheapest:g} bits a value, got {bits_a_value:g}; raise it"
        )
    return columns_L


def _best_of(proposed: Sequence[Ints], tables: Tables, bits_a_value: float) -> Ints:
    """Of the proposed columns, and of the cheapest ones, those within the budget with the least error."""
    columns_PL = np.stack([_cheapest(tables, bits_a_value), *proposed])
    error_P, nbytes_P = tables.totals(columns_PL)
    best: Ints = columns_PL[np.where(_fits(tables, nbytes_P, bits_a_value), error_P, np.inf).argmin()]
    return best


def _shifted(tables: Tables, below_L: Floats) -> list[Ints]:
    """Columns so far below a height, for all heights that differ; beyond the ends of the widths, the ends."""
    last = len(tables.widths) - 1
    height_H = np.unique(np.add.outer(np.arange(last + 1), below_L))
    return list(np.clip(np.floor(np.subtract.outer(height_H, below_L) + 1e-9), 0, last).astype(np.int64))


def _scaled(values_L: Floats) -> Floats:
    """Values between 0 and 1; all 0 where they are equal."""
    scaled: Floats = (values_L - values_L.min()) / (np.ptp(values_L) or 1)
    return scaled


def _clusters(points_LD: Floats, order_L: Floats, count: int) -> Ints:
    """The cluster of each point, by Lloyd's algorithm from groups of equal sizes; numbered by their mean `order`."""
    cluster_L = np.zeros(len(points_LD), dtype=np.int64)
    for cluster, members in enumerate(np.array_split(np.argsort(order_L, kind="stable"), count)):
        cluster_L[members] = cluster
    center_CD = np.stack([points_LD[cluster_L == cluster].mean(axis=0) for cluster in range(count)])
    for _ in range(ROUNDS):
        nearest_L = np.square(points_LD[:, None] - center_CD).sum(axis=-1).argmin(axis=1)
        if (nearest_L == cluster_L).all():
            break
        cluster_L = nearest_L
        for cluster in np.unique(cluster_L):  # one that is left without points stays where it is
            center_CD[cluster] = points_LD[cluster_L == cluster].mean(axis=0)
    found, cluster_L = np.unique(cluster_L, return_inverse=True)
    order_C = [order_L[cluster_L == cluster].mean() for cluster in range(len(found))]
    return np.argsort(np.argsort(order_C, kind="stable"), kind="stable")[cluster_L]


def trained_on_digits() -> Tables:
    """The tables of a real search: the first one of a short training of resnet18 on the handwritten digits."""
    with tempfile.TemporaryDirectory() as workspace:
        flags = f"{RECIPES['digits']} --epochs 2 --run-epochs 1 --prof 8 --search --search-method exact".split()
        command = [sys.executable, *command_of("digits", flags, 0, workspace)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        return load_search(Path(workspace, "adapt_logs/search_0.json")).tables


def table(tables: Tables, bits_a_value: float, repeats: int) -> Iterator[str]:
    """The lines of the table for one budget, in Markdown: every baseline beside the exact solution."""
    solved = within_budget(tables, bits_a_value)
    yield "| method | error | above the least | bits a value | ms |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    solvers: dict[str, Baseline] = {"exact": lambda *asked: within_budget(*asked).bits, **BASELINES}
    for name, solve in solvers.items():
        bits = solve(tables, bits_a_value)
        error = tables.total_error(bits)
        above = f"{100 * (error - solved.lower_bound) / abs(solved.lower_bound):.3f} %" if solved.lower_bound else ""
        took = 1000 * seconds(repeats, functools.partial(solve, tables, bits_a_value))
        yield f"| {name} | {error:.6g} | {above} | {tables.bits_a_value(bits):.4f} | {took:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="a search_N.json (default: one of a short training)")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 4.0, 5.0], help="budgets (default: 3 4 5)")
    parser.add_argument("--passes", type=int, default=2, help="backward passes of ResNet-50 that m accumulates")
    parser.add_argument("--repeats", type=int, default=5, help="runs that each time is the median of")
    flags = parser.parse_args()

    torch.manual_seed(0)
    m = accumulated_gradients(build("resnet50"), flags.passes)
    by_title = {f"ResNet-50, measure {by}": measure_model(m, by) for by in get_args(Measure) if by != "loss"}
    if flags.files:
        by_title |= {file: load_search(file).tables for file in flags.files}
    else:
        by_title["resnet18, first epoch on the digits"] = trained_on_digits()
    print(f"{machine()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, numpy {np.__version__}")
    for title, tables in by_title.items():
        for bits_a_value in flags.bits:
            print(f"\n{title}, {len(tables.layers)} layers, at most {bits_a_value:g} bits a value\n")
            print("\n".join(table(tables, bits_a_value, flags.repeats)), flush=True)


if __name__ == "__main__":
    main()
