"""Layering: who may import whom, and what is imported only inside the functions that need it."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import main

ROOT = Path(__file__).parents[1]
PACKAGES = ("image_classification", "compression", "search")
MAY_IMPORT = {"image_classification": set(), "compression": set(), "search": {"compression"}}
LAZY = ("horovod", "nvidia", "apex", "tensorboard", "torch.utils.tensorboard", "matplotlib", "triton")

COMMANDS = (ROOT / "main.py", ROOT / "search" / "__main__.py")
MODULES = [*sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")), ROOT / "main.py"]
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def imported(path: Path) -> tuple[tuple[str, bool], ...]:
    """(module, whether this runs when the file is imported) of every import in a file, in absolute names."""
    return tuple(_imported(ast.parse(path.read_text()), path.relative_to(ROOT).parts[:-1], True))


def _imported(tree: ast.AST, package: tuple[str, ...], at_once: bool) -> Iterator[tuple[str, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, at_once) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            yield from ((f"{module}.{name.name}", at_once) for name in node.names)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imported(node, package, at_once and not inside)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def reached_at_once(path: Path) -> set[Path]:
    """The program's own files that importing this one imports."""
    reached, waiting = set(), [path]
    while waiting:
        for name, at_once in imported(waiting.pop()):
            parts = name.split(".")
            for count in range(1, len(parts) + 1) if at_once else ():
                module = ROOT.joinpath(*parts[:count])
                for file in (module.with_suffix(".py"), module / "__init__.py"):
                    if file in MODULES and file not in reached:
                        reached.add(file)
                        waiting.append(file)
    return reached


@every_module
def test_packages_import_only_those_below_them(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = {package, *MAY_IMPORT.get(package, PACKAGES)}
    others = {name for name, _ in imported(path) if name.split(".")[0] in (*PACKAGES, "main", "benchmarks", "tests")}
    assert {name.split(".")[0] for name in others} <= allowed, sorted(others)


def test_averagers_speak_to_codecs_and_not_to_kernels() -> None:
    averagers = sorted((ROOT / "compression" / "averagers").glob("*.py"))
    names = {name for path in averagers for name, _ in imported(path)}
    assert not [name for name in names if "kernels" in name.split(".")]
    assert {"compression.codecs.quantizer.Quantizer", "compression.codecs.sparsifiers.TopK"} <= names


def test_nothing_depends_on_the_check_of_what_it_promises() -> None:
    """Nor on ranks in threads, which are for such checks."""
    for path in MODULES:
        if "conformance" in path.parts:
            assert not [text for text in messages(path) if "compression." in text], "the package has other names too"
        else:
            names = {name for name, _ in imported(path)}
            assert not [name for name in names if is_within(name, "compression.conformance")]
            assert not [name for name in names if is_within(name, "compression.network.threads")]


def test_no_codec_makes_layers_to_reach_a_kernel() -> None:
    """Nor does it plan layers: their names, owners and shards are averagers' business."""
    codecs = sorted((ROOT / "compression" / "codecs").glob("*.py"))
    names = {name for path in codecs for name, _ in imported(path)}
    forbidden = ("layers.Layer", "layers.shard", "layers.layers_of", "plans.Segment", "plans.plan")
    assert not names & {f"compression.{name}" for name in forbidden}
    assert "compression.plans.plan_of_messages" in names


def test_the_broken_barrier_reads_no_private_attribute_of_another_class() -> None:
    tree = ast.parse((ROOT / "compression" / "exchange" / "broken_barrier.py").read_text())
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
    private = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    assert private
    assert private <= own
    inherited = ast.parse((ROOT / "compression" / "exchange" / "attached.py").read_text())
    theirs = {node.attr for node in ast.walk(inherited) if isinstance(node, ast.Attribute)}
    assert not private & theirs


@every_module
def test_packages_import_themselves_by_relative_names(path: Path) -> None:
    """So that they can be installed under another name."""
    package = path.relative_to(ROOT).parts[0]
    if package in ("compression", "search"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
        names |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
        assert not [name for name in names if is_within(name, package)]


@every_module
def test_what_many_machines_do_not_have_is_imported_where_it_is_used(path: Path) -> None:
    early = [name for name, at_once in imported(path) for lazy in LAZY if at_once and is_within(name, lazy)]
    if early:  # a module that is itself imported only where it is used may import what it is about
        assert path not in reached_at_once(ROOT / "main.py"), early


@every_module
def test_the_command_line_is_read_by_commands_alone(path: Path) -> None:
    if path not in COMMANDS:
        assert not [name for name, _ in imported(path) if is_within(name, "argparse")]
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert "Namespace" not in names


def messages(path: Path) -> list[str]:
    """The string constants of a file that are no docstrings, nor comments in the form of strings."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone
    ]


LIBRARIES = [path for path in MODULES if path not in COMMANDS]
every_library = pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: str(path.relative_to(ROOT)))


@every_library
def test_libraries_spell_no_flag_of_the_command_line(path: Path) -> None:
    assert [text for text in messages(path) if re.search("--[a-z]", text)] == []


@every_library
def test_every_option_that_a_message_names_is_a_flag_for_users(path: Path) -> None:
    flags = main.parse(["DIR"])
    for text in messages(path):
        for name in re.findall("`([a-z0-9_]+)`", text):
            shown = main.in_flags(f"`{name}`", flags)
            assert shown.startswith("--"), text
            assert shown in main.build_parser()._option_string_actions


def test_options_that_messages_name_are_translated_once_for_all() -> None:
    flags = main.parse(["DIR"])
    message = "no `file` of that name; use a smaller `batch_size`, or resume with `rank` 4"
    translated = "no `file` of that name; use a smaller --batch-size, or resume with --powersgd-rank 4"
    assert main.in_flags(message, flags) == translated


def test_the_walk_over_imports_reaches_the_program() -> None:
    reached = {str(path.relative_to(ROOT)) for path in reached_at_once(ROOT / "main.py")}
    assert {"compression/averagers/observed.py", "search/hulls.py", "image_classification/training.py"} <= reached


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b", [("a.b", True)]),
        ("from . import c", [("search.c", True)]),
        ("from .c import d", [("search.c.d", True)]),
        ("def f():\n    import a", [("a", False)]),
        ("class C:\n    import a", [("a", True)]),
        ("try:\n    import a\nexcept ImportError:\n    a = None", [("a", True)]),
        ("class C:\n    def f(self):\n        from a import b", [("a.b", False)]),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, expected: list[tuple[str, bool]]) -> None:
    assert list(_imported(ast.parse(source), ("search",), True)) == expected
