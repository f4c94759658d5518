"""The summary of the demo: accuracy, bytes, what the search found and how far from the optimum, and the files.

    python benchmarks/summary.py runs/demo
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def last_record(workspace: Path) -> dict[str, Any]:
    """The metrics that a run's raport ends with."""
    records = [json.loads(line.removeprefix("DLLL ")) for line in (workspace / "experiment_raport.json").open()]
    data: dict[str, Any] = next(record["data"] for record in reversed(records) if record["step"] == [])
    return data


def training(title: str, record: dict[str, Any]) -> str:
    sent, dense = record["comm.bytes_sent"] / 1e6, record["comm.bytes_dense"] / 1e6
    return (
        f"{title:<30}top-1 {record['val.top1']:.2f} %; sent {sent:.2f} MB a step and rank where float32 "
        f"takes {dense:.2f} MB: {record['comm.ratio']:.4f} of it"
    )


def searched(found: dict[str, Any]) -> list[str]:
    de, optimum, installed = found["de"], found["optimum"], found["installed"]
    gap = de["objective"] / optimum["objective"] - 1
    widths = Counter(installed["bits"])
    return [
        f"{'differential evolution':<30}objective {de['objective']:.5g} after {de['evaluations']:,} evaluations",
        f"{'certified optimum':<30}objective {optimum['objective']:.5g}; differential evolution is {gap:.1%} above it",
        f"{'installed':<30}{installed['by']}: "
        + ", ".join(f"{count} layers at {bits} bits" for bits, count in sorted(widths.items())),
        "bits per layer",
        *(f"  {name:<40}{bits}" for name, bits in zip(found["layers"], installed["bits"], strict=True)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the demo's runs: train, search and scheme")
    out = parser.parse_args().folder
    logs = out / "search" / "adapt_logs"
    picture = out / "runs.png"
    names = {"4 bits": "train", "widths found": "scheme"}
    raports = [f"{name}={out / run / 'experiment_raport.json'}" for name, run in names.items()]
    plot = Path(__file__).with_name("plot_run.py")
    subprocess.run([sys.executable, str(plot), *raports, "-o", str(picture)], check=True, stdout=subprocess.DEVNULL)
    print("== summary")
    print(training("trained at 4 bits", last_record(out / "train")))
    print("\n".join(searched(json.loads((logs / "search_calibration.json").read_text()))))
    print(training("trained on with those widths", last_record(out / "scheme")))
    print(f"{'picture of both trainings':<30}{picture}")
    files = [*sorted(out.glob("*/*.json")), *sorted(out.glob("*/*.tar")), *sorted(logs.iterdir())]
    print("written:\n" + "\n".join(f"  {path}" for path in files))


if __name__ == "__main__":
    main()
