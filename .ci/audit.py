"""Print the known holes of the pins, by pip-audit. It fails nothing: what is found is for people to weigh.

    .venv/audit/bin/python .ci/audit.py requirements.txt [...]
"""

import json
import subprocess
import sys
from typing import Any

SECONDS = 60  # for an answer


def answer(files: list[str]) -> list[dict[str, Any]]:
    """What pip-audit says of each pin. Raises OSError where it does not answer."""
    words = [word for file in files for word in ("-r", file)]
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        pins: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer within {SECONDS} seconds") from None
    except (ValueError, KeyError):
        raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no answer") from None
    return pins


def report(pins: list[dict[str, Any]]) -> list[str]:
    """Lines: how many pins were looked up, and the holes that are known."""
    looked_up = [pin for pin in pins if "vulns" in pin]
    if not looked_up:
        return [f"audit: skipped, no answer about any of {len(pins)} pins"]
    lines = [
        f"audit: {pin['name']} {pin['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'nothing'}"
        for pin in looked_up
        for hole in pin["vulns"]
    ]
    return [*lines, f"audit: {len(lines)} known holes in {len(looked_up)} of {len(pins)} pins that were looked up"]


if __name__ == "__main__":
    try:
        print("\n".join(report(answer(sys.argv[1:]))))
    except OSError as error:
        print(f"audit: skipped, {error}")
