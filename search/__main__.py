"""The command: checks a search's file, draws it again, solves it for another wish, and compares schemes.

It exits with 0 where all holds, 1 where a file claims what is not so, and 2 for bad input.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .checking import false_claims
from .comparison import compare
from .fronts import front
from .pins import resolve_pins
from .report import as_json, as_text
from .run import METHODS, SearchResult, search
from .saved import naming_damage, read_json, search_from
from .scheme import load_scheme, scheme_of
from .wishes import Wish

WORDS = {
    "objective": "--alpha {alpha:g} --beta {beta:g}",
    "bits": "--target-bits {target:g}",
    "error": "--target-error {target:g}",
    "balance": "--balance",
    "time": "--target-error {target:g} --objective time",
}


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def build_parser() -> Parser:
    """The options, whose wishes are those of a training's search."""
    parser = Parser(prog=f"python -m {__package__}", description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="a search_N.json; several of them with --over-time, or to be checked")
    wishes = parser.add_argument_group("another wish, one of").add_mutually_exclusive_group()
    wish = wishes.add_argument
    wish("--target-bits", "--search-target-bits", metavar="B", type=float, help="least error within B bits a value")
    wish("--target-error", "--search-target-error", metavar="E", type=int, help="fewest bytes with the error of E bits")
    wish("--balance", "--search-balance", action="store_true", help="least (1 + omega) x bytes")
    wish("--alpha", "--search-alpha", metavar="A", type=float, help="power of the error, beside --beta")
    add("--beta", "--search-beta", metavar="B", type=float, help="power of the bytes, beside --alpha")
    add(
        "--pin", "--search-pin", metavar="P", action="append", default=[], help='PATTERN=BITS or "fc.*=4-8"; repeatable'
    )
    add(
        "--objective",
        "--search-objective",
        choices=("bytes", "time"),
        help="with --target-error: fewest bytes, or least step time if the search was for that (default: bytes)",
    )
    add("--method", "--search-method", choices=METHODS, help="how to solve it (default: exact)")
    add("-o", "--output", metavar="SCHEME", help="write the widths as a compress_scheme_N.json")
    add("--plot", metavar="PNG", help="draw widths by layer, and the plane of bytes and error")
    add("--front", metavar="CSV", help="write the front of bytes against error; as JSON where the name ends in .json")
    add("--over-time", metavar="PNG", help="draw the widths of all FILEs over time")
    add("--against", metavar="OTHER", help="compare with another search_N.json or compress_scheme_N.json")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code for these arguments."""
    parser = build_parser()
    flags = parser.parse_args(arguments)
    try:
        with naming_damage(" or ".join(flags.files)):
            return _run(flags)
    except BrokenPipeError:  # whoever reads has read enough; Python writes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")


def _run(flags: argparse.Namespace) -> int:
    if repeated := {path for path in flags.files if flags.files.count(path) > 1}:
        raise ValueError(f"every file is given once, got {min(repeated)} more often")
    contents = {path: read_json(path) for path in flags.files}
    results = {path: search_from(content, path) for path, content in contents.items()}
    _check_outputs(flags)
    path, content = next(iter(contents.items()))
    other = _other(flags.against, results[path]) if flags.against else None
    wish = _wish(flags)
    of_one = ("target_bits", "target_error", "alpha", "beta", "method", "output", "plot", "front", "against")
    if len(results) > 1 and (wish or flags.pin or any(getattr(flags, name) is not None for name in of_one)):
        raise ValueError(f"several files can be checked and drawn over time, and nothing else, got {len(results)}")
    if flags.over_time:
        from .plotting import plot_bits_over_time

        picture = plot_bits_over_time({_name_among(file, list(results)): each for file, each in results.items()})
        Path(flags.over_time).write_bytes(picture)
    if wish is None and not flags.pin and flags.method is None:
        result = results[path]
        _write(flags, result, content)
        false = _check(contents)
        if false or len(results) > 1:
            return int(false)
    else:
        result = _solve(results[path], wish, flags)
        _write(flags, result, content)
    print(as_text(result, Path(path).stem.removeprefix("search_"), WORDS))
    for name, setting in result.settings.items():
        print(f"  {name}: {setting}")
    if other is not None:
        print(compare(result.tables, result.installed, other, (Path(path).name, Path(flags.against).name)))
    return 0


def _check_outputs(flags: argparse.Namespace) -> None:
    """Raise ValueError for a file to write that is one to read, or whose folder is not there."""
    read = {Path(path).resolve() for path in (*flags.files, flags.against) if path}
    for name in ("output", "front", "plot", "over_time"):
        path = getattr(flags, name)
        if path is None:
            continue
        if Path(path).resolve() in read:
            raise ValueError(f"{path} is read and would be written over; give another name")
        if not Path(path).resolve().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {Path(path).parent}; make it first")


def _name_among(file: str, files: Sequence[str]) -> str:
    """The epoch of a search's file, after its folder where another one has the same."""
    name = Path(file).stem.removeprefix("search_")
    alike = sum(Path(other).stem.removeprefix("search_") == name for other in files)
    return name if alike == 1 else str(Path(file).with_name(name))


def _wish(flags: argparse.Namespace) -> Wish | None:
    if flags.objective is not None and flags.target_error is None:
        raise ValueError("--objective is of what is within an error; add --target-error")
    if (flags.alpha is None) != (flags.beta is None):
        raise ValueError("--alpha and --beta are powers of one objective; give both")
    if flags.alpha is not None:
        return Wish.objective(flags.alpha, flags.beta)
    if flags.target_bits is not None:
        return Wish.bits(flags.target_bits)
    if flags.target_error is not None:
        return Wish.time(flags.target_error) if flags.objective == "time" else Wish.error(flags.target_error)
    return Wish.balance() if flags.balance else None


def _check(contents: Mapping[str, Mapping[str, Any]]) -> bool:
    """Say of each file whether it holds; true where one does not."""
    claims = {path: false_claims(content, path) for path, content in contents.items()}
    for path, of_file in claims.items():
        print("\n".join(f"{path}: {claim}" for claim in of_file or ["every claim holds."]))
    return any(claims.values())


def _solve(old: SearchResult, wish: Wish | None, flags: argparse.Namespace) -> SearchResult:
    tables = old.tables
    pins = {**old.bounds, **resolve_pins(flags.pin, tables.layers, tables.widths)}
    return search(
        tables,
        wish or old.wish,
        flags.method or "exact",
        old.popsize,
        old.iterations,
        old.seed,
        pins,
        old.settings,
        old.timeline,
    )


def _write(flags: argparse.Namespace, result: SearchResult, content: Mapping[str, Any]) -> None:
    if flags.output:
        scheme = scheme_of(result.bits_by_layer(), content.get("uncompressed", []))
        Path(flags.output).write_bytes(as_json(scheme, indent=1))
    if flags.front:
        reached = front(result.tables, result.installed, result.bounds)
        as_text_of = as_json(reached.to_json()) if flags.front.endswith(".json") else reached.to_csv().encode()
        Path(flags.front).write_bytes(as_text_of)
    if flags.plot:
        from .plotting import plot

        Path(flags.plot).write_bytes(plot(result))


def _other(path: str, result: SearchResult) -> tuple[int, ...]:
    """Widths of the same layers from another search's file, or from a scheme."""
    content, layers = read_json(path), result.tables.layers
    if "installed" in content:
        other = search_from(content, path)
        bits = other.bits_by_layer()
        if set(bits) != set(layers):
            raise ValueError(f"{path}: two searches compare by the same layers, and this one has others")
        if unknown := sorted(set(bits.values()) - set(result.tables.widths)):
            raise ValueError(
                f"{path}: two searches compare by the tables of the first, which have no width of {unknown[0]} bits"
            )
    else:
        bits = load_scheme(path, layers)
    return tuple(bits[name] for name in layers)


if __name__ == "__main__":
    sys.exit(main())
