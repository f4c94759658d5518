"""The effect of compression on accuracy: the same training with several compressors and seeds, in one Markdown table.

    python benchmarks/accuracy.py digits --epochs 8 --seeds 3 -- "none" "maxmin --error-feedback"
    python benchmarks/accuracy.py cifar10.tar.xz --epochs 5 --seeds 3 -- "none" "maxmin --error-feedback"

Each setting is a `--compression-type` with its flags, or flags alone.
The training flags are those of RECIPES, and all runs have two ranks under torchrun. A row gives top-1 after the last
epoch as mean and standard deviation over the seeds, how much it and the loss differ from the first row's, paired by
seed, with the standard error of that, bytes sent as a fraction of float32's, and seconds. With
`--runs FILE` every finished run is kept there, one JSON object a line, and is not run again: a table that was cut off
goes on, and later ones add to it. Runs on other data are others, whatever their folder is called, and so are runs of
other code, its comments and docstrings aside.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

MAIN = Path(__file__).resolve().parents[1] / "main.py"
PACKAGES = ("compression", "image_classification", "search")  # of which the trainer is made
RANKS = 2

RECIPES = {
    "digits": "-a resnet18 --num-classes 10 --image-size 32 --crop-scale 0.6 --hflip 0 -b 32 --lr 0.02 "
    "--lr-schedule cosine --warmup 1",
    "cifar10": "-a resnet18 --num-classes 10 --image-size 32 --crop-scale 0.4 -b 64 --lr 0.05 "
    "--lr-schedule cosine --warmup 1",
}
KEY = ("data", "code", "flags", "seed", "ranks")  # of a run
ALWAYS = "--data-backend pytorch -j 0 --no-checkpoints --print-freq 1000"


@contextlib.contextmanager
def folder_of(dataset: str) -> Iterator[str]:
    """The DIR of main.py: `digits`, a folder as it is, or a tar file unpacked for as long as it is needed."""
    if not dataset.endswith((".tar", ".tar.xz", ".tar.gz")):
        yield dataset
        return
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(dataset) as archive:
            archive.extractall(scratch, filter="data")
        yield str(next(path for path in Path(scratch).iterdir() if path.is_dir()))


@functools.cache
def digest_of(folder: str) -> str:
    """What tells data sets apart, wherever they lie: a digest of their files' names and sizes."""
    if folder == "digits":
        return folder
    listed = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            listed.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
    return listed.hexdigest()[:16]


@functools.cache
def digest_of_code(root: Path = MAIN.parent) -> str:
    """What tells versions of the trainer apart: a digest of its code, of which comments and docstrings are no part."""
    code = hashlib.sha256()
    for path in sorted((root / MAIN.name, *(path for name in PACKAGES for path in (root / name).rglob("*.py")))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
        code.update(f"{path.relative_to(root)}\0{ast.unparse(tree)}\0".encode())
    return code.hexdigest()[:16]


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


class Runs:
    """Finished runs by (data, code, training flags, seed, ranks), kept in a file where one is named.

    Those of a file that does not say on which data and of which code they were are not used.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        runs = [run for run in map(json.loads, lines) if run.keys() >= {"data", "code"}]
        self.known = {tuple(run[part] for part in KEY): run["metrics"] for run in runs}
        if len(runs) < len(lines):
            print(f"{path}: {len(lines) - len(runs)} runs on unknown data or code are not used", file=sys.stderr)

    def get(self, folder: str, flags: list[str], seed: int, ranks: int = RANKS) -> dict[str, Any]:
        """The result of `train`, trained now where it was not before."""
        key = (digest_of(folder), digest_of_code(), " ".join(flags), seed, ranks)
        if key not in self.known:
            self.known[key] = train(folder, flags, seed, ranks)
            if self.path is not None:
                run = {**dict(zip(KEY, key, strict=True)), "metrics": self.known[key]}
                with self.path.open("a") as file:
                    file.write(json.dumps(run) + "\n")
        return self.known[key]


def command_of(folder: str, flags: list[str], seed: int, workspace: str) -> list[str]:
    """The program and its flags, for one rank or for what launches ranks."""
    return [str(MAIN), folder, *ALWAYS.split(), *flags, "--seed", str(seed), "--workspace", workspace]


def logged(workspace: str) -> list[dict[str, Any]]:
    """The records of the raport that a run left in its workspace."""
    lines = (Path(workspace) / "experiment_raport.json").read_text().splitlines()
    return [json.loads(line.removeprefix("DLLL ")) for line in lines]


def train(folder: str, flags: list[str], seed: int, ranks: int) -> dict[str, Any]:
    """The last epoch's metrics of one run over loopback; `seconds`; `top1`, in percent after each epoch; `scheme`, the
    widths that a search found last, where there was one."""
    with tempfile.TemporaryDirectory() as workspace:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += command_of(folder, flags, seed, workspace)
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        records = logged(workspace)
        last = next(record["data"] for record in reversed(records) if record["step"] == [])
        top1 = [record["data"]["val.top1"] for record in records if len(record["step"]) == 1]
        schemes = sorted(Path(workspace).glob("adapt_logs/compress_scheme_*.json"), key=os.path.getmtime)
        scheme = json.loads(schemes[-1].read_text()) if schemes else None
        return last | {"seconds": seconds, "top1": top1, "scheme": scheme}


def recipe_for(dataset: str) -> str:
    """The training flags by the data set's name; those of CIFAR-10 where it tells nothing."""
    return RECIPES[next((name for name in RECIPES if name in dataset), "cifar10")]


def flags_of(setting: str) -> list[str]:
    """A setting is the flags themselves, or a compressor's name before them."""
    words = setting.split()
    return words if words[0].startswith("-") else ["--compression-type", *words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="digits, an ImageFolder, or a tar file of one")
    parser.add_argument("settings", nargs="+", help="compressors with their flags")
    parser.add_argument("--recipe", choices=RECIPES, help="training flags (default: by the dataset's name)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, metavar="FILE", help="keep finished runs here, and take them from here")
    asked = parser.parse_args()
    training = RECIPES[asked.recipe] if asked.recipe else recipe_for(asked.dataset)
    recipe = [*training.split(), "--epochs", str(asked.epochs)]
    print(f"{asked.dataset}: {RANKS} ranks, {' '.join(recipe)}, seeds 0 to {asked.seeds - 1}")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} cores, torch {torch.__version__}\n")
    finished = Runs(asked.runs)
    with folder_of(asked.dataset) as folder:
        results: dict[str, list[dict[str, Any]]] = {setting: [] for setting in asked.settings}
        for seed in range(asked.seeds):
            for setting, runs in results.items():
                runs.append(finished.get(folder, recipe + flags_of(setting), seed))
                print(f"seed {seed}, {setting}: {runs[-1]['val.top1']:.2f} %", file=sys.stderr, flush=True)
    print("| setting | top-1, % | deviation | difference | loss | difference | bytes sent, of float32 | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    first = results[asked.settings[0]]
    for setting, runs in results.items():
        top1 = [run["val.top1"] for run in runs]
        spread = f"{statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
        loss = statistics.mean(run["val.loss"] for run in runs)
        cells = [f"{statistics.mean(top1):.1f}", spread, paired(runs, first, "val.top1", 1)]
        cells += [f"{loss:.3f}", paired(runs, first, "val.loss", 3), f"{runs[0]['comm.ratio']:.4f}"]
        cells.append(f"{statistics.median(run['seconds'] for run in runs):.0f}")
        print(f"| `{setting}` | {' | '.join(cells)} |")


def paired_difference(
    runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], metric: str
) -> tuple[float, float | None]:
    """The mean difference of two settings' metric, seed by seed, and its standard error where there are more seeds."""
    apart = [run[metric] - other[metric] for run, other in zip(runs, others, strict=True)]
    return statistics.mean(apart), statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else None


def paired(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], metric: str, digits: int) -> str:
    """That difference as a cell of a table; nothing for a setting beside itself."""
    if runs is others:
        return ""
    mean, error = paired_difference(runs, others, metric)
    return f"{mean:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


if __name__ == "__main__":
    main()
