"""What tests of several folders share."""

import atexit
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# No example has a time limit: a busy machine is no failure.
profile = settings.get_current_profile_name()
settings.register_profile("unhurried", settings.get_profile(profile), deadline=None)
settings.load_profile("unhurried")


def pytest_configure() -> None:
    """Remove what programs leave in the temporary folder: torch's launcher its logs, who was killed its sockets."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # where pytest keeps its last few runs
    folder = tempfile.TemporaryDirectory(prefix="tests-")
    atexit.register(folder.cleanup)  # after multiprocessing, which is imported later, has removed what is its own
    tempfile.tempdir = os.environ["TMPDIR"] = folder.name
    # torch makes this folder as soon as torchvision is imported, whether or not anything is compiled.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder.name, "compiled"))


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
