"""`--skip-bad-images`: what was left out is named once in a run, whichever rank met it, and counted in each epoch."""

import re
import shutil
from pathlib import Path

from tests.support.program import SMALL, run_well


def test_images_that_are_skipped_are_named_once_and_counted_in_each_epoch(pictures: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pictures, tmp_path / "data")
    bad = [data / "train" / f"class{label}/{index}.png" for label in (0, 2) for index in range(8)]
    bad += [data / "val/class1/3.png", data / "val/class1/4.png"]
    for path in bad:
        path.write_text("no image")
    first, second = run_well(data, *SMALL, "--workspace", tmp_path / "w", "--epochs", 2, "--skip-bad-images", ranks=2)
    named = re.findall(r"^skipped: (\S+) \(.+\)$", first.err, re.MULTILINE)
    assert sorted(named) == sorted(map(str, bad))
    counts = re.findall(r"^(\d+) unreadable images were skipped in the (.*)$", first.err, re.MULTILINE)
    assert [where for _, where in counts] == ["training of epoch 0", "validation", "training of epoch 1", "validation"]
    assert [int(count) for count, where in counts if where == "validation"] == [2, 2]
    assert all(int(count) >= 16 for count, where in counts if where != "validation")
    assert second.err == ""
