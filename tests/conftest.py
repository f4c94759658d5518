"""Fixtures and settings that tests of several folders use."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import is_hypothesis_test, settings
from PIL import Image

# No example has a time limit: a busy machine is no failure.
profile = settings.get_current_profile_name()
settings.register_profile("unhurried", settings.get_profile(profile), deadline=None)
settings.register_profile("slow", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("unhurried")
TIMES_SLOW = 10
"""Factor of the number of examples that a property is tried on, under the profile `slow`."""


def pytest_configure() -> None:
    """Remove what programs leave in the temporary folder: torch's launcher its logs, who was killed its sockets."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # where pytest keeps its last few runs
    # No TemporaryDirectory: from Python 3.14 on, forked processes drop what atexit holds, and the folder would go.
    folder = tempfile.mkdtemp(prefix="tests-")
    # After multiprocessing, which is imported later, has removed what is its own.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    # torch makes this folder as soon as torchvision is imported, whether or not anything is compiled.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "compiled")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Raise the number of examples that each property states for itself, under the profile `slow`.

    It wins over a profile's, and Hypothesis has no public way to change it.
    """
    if settings.get_current_profile_name() == "slow":
        for test in {item.obj for item in items if isinstance(item, pytest.Function) and is_hypothesis_test(item.obj)}:
            stated = test._hypothesis_internal_use_settings
            test._hypothesis_internal_use_settings = settings(stated, max_examples=TIMES_SLOW * stated.max_examples)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes, 24 training and 9 validation images of 32 x 32 noise each; a class is a color."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 24), ("val", 9)):
        for label in range(3):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                noise = np.random.default_rng([label, index, count]).integers(0, 90, (32, 32, 3), dtype=np.uint8)
                noise[..., label] += 120
                Image.fromarray(noise).save(folder / f"{index}.png")
    return root
