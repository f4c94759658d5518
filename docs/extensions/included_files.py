"""Links to files of the checkout that are a page here: what is `../BENCHMARKS.md` on a code host is `benchmarks.md`."""

import re
from pathlib import Path
from typing import Any

INCLUDE = re.compile(r"^(?:```|:::)\{include\} \.\./(\S+)", re.MULTILINE)


def pages(folder: Path) -> dict[str, str]:
    """The page that includes a file of the checkout, by that file's path from the folder of pages."""
    found = {}
    for page in sorted(folder.glob("*.md")):
        for name in INCLUDE.findall(page.read_text(encoding="utf-8")):
            found[f"../{name}"] = page.name
    return found


def redirect(app: Any, page: str, source: list[str]) -> None:
    for file, target in pages(Path(app.srcdir)).items():
        source[0] = re.sub(rf"\]\({re.escape(file)}(?=[)#])", f"]({target}", source[0])


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", redirect)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
