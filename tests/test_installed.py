"""The package, built as a wheel and installed into an environment of its own: what others get.

The environment has what the wheel asks for and nothing else, as links to the packages that the tests run on.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import compression
from tests.support.wheel import build_wheel

ROOT = Path(__file__).parents[1]
OWN_SEARCH, OWN_COMPRESSION = "how = 'theirs'\n", "ratio = 'theirs'\n"

TRAIN = """
import hashlib, json, os, sys

import compression, search
import torch, torch.distributed as dist
import gradwire

as_on_macos = sys.argv[1] == "as on macOS"
if as_on_macos:
    del os.sched_getaffinity, os.memfd_create
dist.init_process_group("gloo")
two_hosts = {"hierarchical": True, "ranks_per_host": 2}
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
exchange = gradwire.attach(model, "maxmin", bits=4, error_feedback=True, **(two_hosts if as_on_macos else {}))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
torch.manual_seed(dist.get_rank())
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy().tobytes()
report = exchange.report()
names = [name for name in sys.modules if name.split(".")[0] in ("compression", "search")]
line = json.dumps([hashlib.sha256(weights).hexdigest(), report.bytes_sent, report.bytes_dense, names,
                   compression.ratio, search.how, gradwire.__file__, gradwire.__version__])
sys.stdout.write(line + "\\n")  # in one piece: torchrun's ranks are unbuffered, and print writes a line's end apart
exchange.close()
dist.destroy_process_group()
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def closure(requirements: list[str]) -> set[str]:
    """The names of installed distributions that these requirements ask for, directly or not."""
    wanted, names = [Requirement(text) for text in requirements], set()
    while wanted:
        requirement = wanted.pop()
        if requirement.name in names or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        names.add(requirement.name)
        wanted += map(Requirement, importlib.metadata.requires(requirement.name) or [])
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment in which the wheel is installed."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True, with_pip=False)
    python = home / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (built,) = importlib.metadata.distributions(path=[str(wheel)])
    for name in closure(built.requires or []):
        distribution = importlib.metadata.distribution(name)
        for part in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            (packages / part).symlink_to(Path(str(distribution.locate_file(part))))
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    run(*pip, "install", "--quiet", "--no-index", str(wheel), cwd=home)
    assert run(*pip, "check", cwd=home).startswith("No broken requirements")
    return python


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that has packages `search` and `compression` of its own."""
    for name, text in (("search", OWN_SEARCH), ("compression", OWN_COMPRESSION)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


def test_the_wheel_is_one_package_with_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        installed = {Path(name) for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    ours = {Path("gradwire", path.relative_to(ROOT / "compression")) for path in (ROOT / "compression").rglob("*.py")}
    ours |= {Path("gradwire", path.relative_to(ROOT)) for path in (ROOT / "search").rglob("*.py")}
    assert installed == ours | {Path("gradwire/py.typed")}
    assert len(licenses) == 1


@pytest.mark.parametrize(("ranks", "system"), [(2, "as here"), (4, "as on macOS")])
def test_ranks_train_beside_packages_of_these_names(ranks: int, system: str, python: Path, project: Path) -> None:
    launch = (python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
    first, *others = map(json.loads, run(*launch, "train.py", system, cwd=project, OMP_NUM_THREADS="1").splitlines())
    assert [other[0] for other in others] == [first[0]] * (ranks - 1), "replicas differ"
    sent, dense, *rest = first[1:]
    assert 0 < sent < 0.2 * dense
    packages = sysconfig.get_path("purelib", vars={"base": str(python.parents[1])})
    file = f"{packages}/gradwire/__init__.py"
    assert rest == [["compression", "search"], "theirs", "theirs", file, compression.__version__]


def test_its_search_asks_for_scipy_by_the_name_of_the_extra(python: Path, project: Path) -> None:
    program = """
import gradwire.search
assert gradwire.search.optimum and gradwire.search.within_budget
try:
    gradwire.search.search
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(python, "-c", program, cwd=project) == (
        "`search` needs scipy: install it, or gradwire[search], which brings it\n"
    )


def test_it_checks_compressors_of_others(python: Path, project: Path) -> None:
    (project / "mine.py").write_text(
        "from gradwire.codecs.base import Float32\n\nclass Mine(Float32):\n    'Values as they are.'\n"
    )
    verdict = run(python, "-m", "gradwire.conformance", "mine:Mine", cwd=project)
    assert " 0 FAILS" in verdict.splitlines()[-1]


def test_importing_it_loads_nothing_heavy_and_tells_its_version(python: Path, project: Path) -> None:
    program = "import gradwire, sys; print(gradwire.__version__, 'torch' in sys.modules, 'numpy' in sys.modules)"
    assert run(python, "-c", program, cwd=project).split() == [compression.__version__, "False", "False"]
    told = run(python, "-c", "from importlib.metadata import version; print(version('gradwire'))", cwd=project)
    assert told.strip() == compression.__version__


def test_documents_name_this_version() -> None:
    assert f"\nversion: {compression.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"({compression.__version__})" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_types_know_which_names_there_are(python: Path, project: Path) -> None:
    (project / "typed.py").write_text(
        "import gradwire\nimport gradwire.search\n\ngradwire.build('maxmin')\ngradwire.search.optimum\n"
        "gradwire.atach\ngradwire.search.optimun\n"
    )
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "--ignore-missing-imports", "typed.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=900, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.split(": ")[0] for line in errors] == ["typed.py:6", "typed.py:7"], done.stdout
