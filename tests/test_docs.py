"""The pages of docs/: what they show runs, and what they say of the program is so.

How a fenced block is marked, by the word after its fence:

    bash, python  run here, in the page's order and in one folder; all Python of a page is one script
    console       for machines or environments that the tests have not: read, and held to the program's flags
    text, json    output and files

A block without a word, or with another one, is an error, so that nothing is shown untested by oversight.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import compression
import main
import search
from compression import COMPRESSORS, Solo, build
from compression.layers import layers_of
from tests.support.markdown import ROOT, blocks, commands
from tests.support.modules import loaded

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
HELD_ELSEWHERE = {"hosts.md": "test_hosts_page.py"}
"""Pages whose blocks have a file of tests of their own."""
RUN, READ, SHOWN = {"bash", "python"}, {"console"}, {"text", "json"}
FOR_THE_READERS_ENVIRONMENT = {"source .venv/bin/activate", "pip install ."}


def named(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


def shown(page: Path, language: str) -> list[str]:
    """The blocks of a language; none of a page that is held elsewhere."""
    return [] if page.name in HELD_ELSEWHERE else [block.text for block in blocks(page) if block.language == language]


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


# What is shown


@named(PAGES)
def test_every_block_is_marked(page: Path) -> None:
    unknown = [
        f"line {block.line}: {block.language!r}"
        for block in blocks(page)
        if block.language not in RUN | READ | SHOWN and not re.match(r"\{[a-z-]+\}", block.language)
    ]
    assert unknown == []


def test_pages_that_are_held_elsewhere_are() -> None:
    for page, test in HELD_ELSEWHERE.items():
        assert f'"docs" / "{page}"' in (ROOT / "tests" / test).read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to run in, from which the program and, by the name that it installs as, the library are found."""
    for name in ("main.py", "benchmarks", "search", "compression"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "gradwire").mkdir()
    for path in (*(ROOT / "compression").iterdir(), ROOT / "search"):
        (tmp_path / "gradwire" / path.name).symlink_to(path)
    return tmp_path


def run(command: list[str], folder: Path) -> None:
    """Run a command, which must end well. Ranks compute in one thread: on a busy machine more are slower."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@named([page for page in PAGES if shown(page, "bash")])
def test_commands_run_as_shown(page: Path, folder: Path) -> None:
    for block in shown(page, "bash"):
        run(["bash", "-euo", "pipefail", "-c", block], folder)


@named([page for page in PAGES if shown(page, "python")])
def test_the_python_of_a_page_is_a_script_that_runs(page: Path, folder: Path) -> None:
    """By torchrun, on as many ranks as the page says, or else by Python."""
    (folder / "script.py").write_text("\n".join(shown(page, "python")))
    launched = re.search(r"`torchrun (--nproc_per_node \d+) script\.py`", page.read_text(encoding="utf-8"))
    launcher = ["-m", "torch.distributed.run", "--standalone", *launched[1].split()] if launched else []
    run([sys.executable, *launcher, "script.py"], folder)


@named([page for page in PAGES if shown(page, "console")])
def test_commands_for_other_machines_are_what_the_program_takes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for command in [command for block in shown(page, "console") for command in commands(block)]:
        words = shlex.split(command)
        if "main.py" in words:
            ranks = next((int(words[at + 1]) for at, word in enumerate(words) if word == "--nproc_per_node"), 0)
            with monkeypatch.context() as launched:
                for name, value in {"RANK": 0, "WORLD_SIZE": ranks}.items() if ranks else ():
                    launched.setenv(name, str(value))
                main.parse(words[words.index("main.py") + 1 :])
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), command
        elif words[1:] and words[1].startswith("benchmarks/"):
            assert (ROOT / words[1]).is_file(), command
        else:
            assert command in FOR_THE_READERS_ENVIRONMENT


# What is said


def test_every_page_is_in_the_tree() -> None:
    [tree] = [block for block in blocks(DOCS / "index.md") if block.language == "{toctree}"]
    pages = [line for line in tree.text.splitlines() if re.fullmatch(r"\w+", line)]
    assert sorted([*pages, "index"]) == [page.stem for page in PAGES]


@named(PAGES)
def test_tests_that_a_page_names_are_there(page: Path) -> None:
    paths = re.findall(r"`(tests/[\w./]+)`", page.read_text(encoding="utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_claims_of_reliability_name_their_tests() -> None:
    sections = text_of("reliability.md").split("\n## ")[1:]
    claims = [claim for section in sections for claim in re.split(r"^\* ", section, flags=re.MULTILINE)[1:]]
    assert len(claims) > 15
    assert [claim for claim in claims if "tests/" not in claim] == []


def module(name: str) -> Any:
    """One of the extensions with which the pages are built."""
    return loaded(DOCS / "extensions" / f"{name}.py")


def test_the_page_of_the_command_line_has_every_flag_group_and_choice() -> None:
    extension, parser = module("command_line"), main.build_parser()
    page = extension.flags(parser)
    assert text_of("command_line.md").count(extension.MARK) == 1
    entries = re.findall(r"^````\{option\} (.*)\n\n(.*)\n````$", page, re.MULTILINE)
    assert len(entries) == len(parser._actions)
    for action in parser._actions:
        [(spelled, said)] = [
            (spelled, said)
            for spelled, said in entries
            if [word.split()[0] for word in spelled.split(", ")] == (action.option_strings or [action.metavar])
        ]
        for choice in action.choices or ():
            assert str(choice) in (spelled + said).replace("\\", "")
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert [title.lower() for title in titles[1:]] == [group.title for group in parser._action_groups[2:]]


def test_flags_in_a_help_text_are_links() -> None:
    assert module("command_line").escaped("with --search: 2*x_1, not -1") == (
        "with {option}`--search`: 2\\*x\\_1, not -1"
    )


def test_the_reference_has_every_public_name_once() -> None:
    names = re.findall(r"^\.\. (?:auto\w+|py:data):: gradwire\.(\w+)$", text_of("api.md"), re.MULTILINE)
    assert sorted(names) == sorted(compression.__all__)
    names = re.findall(r"^\.\. auto\w+:: gradwire\.search\.(\w+)$", text_of("api.md"), re.MULTILINE)
    assert sorted(names) == sorted(search.__all__)


def test_docstrings_become_the_dialect_of_their_reader() -> None:
    lines = ["`a_b` and |v|:", "", "    x = f(*y)", "", "then `c`"]
    assert list(module("docstrings").rewritten(lines)) == [
        "``a_b`` and \\|v\\|:", "", "::", "", "    x = f(*y)", "", "then ``c``",
    ]  # fmt: skip


def test_names_and_what_they_are_become_a_list() -> None:
    lines = ["Said:", "", "a_b    one *or*", "       more", "c, d   two", "", "Done.", "", "    code()"]
    assert list(module("docstrings").rewritten(lines)) == [
        "Said:", "", "", "* ``a_b``: one \\*or\\*", "  more", "* ``c, d``: two",
        "", "Done.", "", "::", "", "    code()",
    ]  # fmt: skip


def test_a_file_that_is_a_page_is_linked_as_one() -> None:
    class App:
        srcdir = DOCS

    source = ["see [it](../BENCHMARKS.md#scale) and [this](../examples/diloco.py)"]
    module("included_files").redirect(App, "any", source)
    assert source == ["see [it](benchmarks.md#scale) and [this](../examples/diloco.py)"]


# Compressors

SECTIONS = dict(
    re.match(r"(\w+)\n(?s:(.*))", section).groups()  # type: ignore[union-attr]
    for section in text_of("compressors.md").split("\n## ")[1:]
    if re.match(r"\w+\n\n\$\$", section)
)


def test_every_compressor_has_a_section_and_no_other_has() -> None:
    assert sorted(SECTIONS) == sorted(COMPRESSORS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_says_what_its_reader_needs(name: str) -> None:
    said = re.findall(r"^\* \*\*(.*?)\*\*", SECTIONS[name], re.MULTILINE)
    assert said == ["Paper:", "Bits a value:", "Take it", "Not"]


@pytest.mark.parametrize("name", SECTIONS)
def test_bits_are_those_that_are_sent(name: str) -> None:
    """At two ranks every way of averaging sends what is encoded once."""
    layers = layers_of([("weight", (512, 256, 3, 3))], 512)
    averager = build(name).averager(layers, Solo(), 0)
    bits = 8 * averager.sent(layers, 2).total / layers[0].numel
    [line] = re.findall(r"^\* \*\*Bits a value:\*\*(.*)$", SECTIONS[name], re.MULTILINE)
    assert re.findall(r"\d+\.\d{3}", line) == [f"{bits:.3f}"]


def test_accuracies_are_those_of_the_log() -> None:
    measured = set(re.findall(r"\| (\d\d\.\d) \|", text_of("LOG.md")))
    quoted = re.findall(r"(?<![\d.])\d\d\.\d(?!\d)", text_of("compressors.md"))
    assert len(quoted) > 10
    assert set(quoted) <= measured


# The build


def test_the_pages_build_without_a_warning_and_need_no_network(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "pydata_sphinx_theme"):
        pytest.importorskip(package, reason="Sphinx is not installed: make docs")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-b", "html", "-n", "-W", "--keep-going", "-q", "docs", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    html = {page.stem: (tmp_path / f"{page.stem}.html").read_text(encoding="utf-8") for page in PAGES}
    for text in html.values():
        assert re.findall(r'<(?:script|link|img)[^>]*"(https?:[^"]*)"', text) == []
    spelled = {word.lstrip("-") for action in main.build_parser()._actions for word in action.option_strings}
    assert {f"main.py-{word}" for word in spelled} <= set(re.findall(r'id="cmdoption-([^"]*)"', html["command_line"]))
    formulas = text_of("compressors.md").count("$$") // 2
    assert len(re.findall(r'<math [^>]*display="block">', html["compressors"])) == formulas
    assert all(f'id="gradwire.{name}"' in html["api"] for name in compression.__all__)
    assert all(f'id="gradwire.search.{name}"' in html["api"] for name in search.__all__)
