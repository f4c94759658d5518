"""Checkpoints: all that a run needs to go on bit for bit, in one file that cannot run code.

A file holds one dictionary of tensors and plain values. The trainer fills it; this module looks at the first five
keys only, and knows neither models, optimizers nor ranks.

| key | value |
| --- | --- |
| `epoch` | epochs done, which is also the number of the next one |
| `iteration` | batches done of that next one: the sampler's position |
| `arch`, `num_classes` | the network that the weights fit |
| `state_dict` | the model's parameters and buffers, those of rank 0 |
| `best_prec1` | the best top-1 so far, percent |
| `optimizer` | momentum, master weights, loss scale; the schedule is a function of the epoch and has no state |
| `images_per_iteration` | images of one batch of all ranks: `iteration` counts them |
| `metrics` | those of training in the epoch that `iteration` is in, by name |
| `memory_format` | order in memory, nchw or nhwc, of the values that compression and search remember |
| `widths` | layer name -> bits of its codes, 32 where it is not encoded |
| `seed` | seed of the run, also where none was asked for |
| `world_size` | ranks that wrote it |
| `ranks` | per rank: `random` (see `random_state`), `buffers` (batch-norm statistics), `exchange` (residuals and all |
| | other memory of its compressor) |
"""

import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from image_classification.atomic import replacing
from image_classification.copies import BEST, names_of_copies

_LOOKED_AT = ("epoch", "iteration", "arch", "num_classes", "state_dict")


class Damaged(ValueError):
    """A file that is no whole checkpoint, or holds no weights."""


class Misfit(ValueError):
    """A good file that belongs to another run or another model."""


def save(content: Mapping[str, Any], folder: Path, filename: str, *, best: bool, gather: bool) -> None:
    """Write a checkpoint to `folder`, made where missing; with `best` a second time as `model_best.pth.tar`.

    With `gather`, some epochs stay as `checkpoint-{epoch + 1}.pth.tar` too, see `names_of_copies`. The last good file
    is replaced only by one that has been read back, and last of all: a run that is killed between the copies does the
    epoch again, and all of them with it.

    Raises OSError where nothing could be written; earlier files are intact.
    """
    copies = names_of_copies(content["epoch"], content["iteration"], best=best, gather=gather)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / filename) as file:
            torch.save(dict(content), file)
            file.flush()
            torch.load(file.name, map_location="cpu", weights_only=True, mmap=True)
            for name in copies:
                with replacing(folder / name) as copy:
                    file.seek(0)
                    shutil.copyfileobj(file, copy)
    except (OSError, RuntimeError) as error:
        # torch.save hides a full disk behind a RuntimeError of its own.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(f"cannot write checkpoint {folder / filename}: {reason.strerror}; "
                      "the last one is intact; make room or choose another workspace") from error


def load(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint in a file, on the CPU; `expected` holds the keys whose values this run shares with it.

    Raises FileNotFoundError where there is none; Damaged where it is truncated, changed on disk, or no checkpoint of
    this program; Misfit where a value differs from the expected one.
    """
    content = _read(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums that it writes
            broken = archive.testzip()
    except Exception as error:  # damaged bytes can lead the reader to any of them
        raise Damaged(f"checkpoint {path} is damaged ({error}); choose another") from error
    if broken:
        raise Damaged(f"checkpoint {path} is damaged (wrong checksum of {broken}); choose another")
    for key, value in expected.items():
        if content.get(key) != value:
            raise Misfit(f"checkpoint {path} has {key} {content.get(key)}, and this run has {value}; "
                         "choose another checkpoint or workspace, or run it as it was")
    return content


def newest_good(
    folder: Path, filename: str, expected: Mapping[str, Any], warn: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that got furthest in a folder, and its content; None where there is none.

    Looks at `filename`, `model_best.pth.tar` and the gathered ones. A damaged file is passed over with one line
    to `warn`. Raises Misfit where the newest one belongs to another run, which going on would overwrite.
    """
    paths = [folder / filename, folder / BEST, *folder.glob("checkpoint-*.pth.tar")]
    found = []
    for path in filter(Path.exists, dict.fromkeys(paths)):
        try:
            content = _read(path, mmap=True)
            found.append(((content["epoch"], content["iteration"]), path))
        except Damaged as error:
            warn(f"passed over: {error}")
    for _, path in sorted(found, key=lambda item: item[0], reverse=True):
        try:
            return path, load(path, expected)
        except Damaged as error:
            warn(f"passed over: {error}")
    return None


def _read(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's content, with checksums not yet compared."""
    content = _unpickle(path, "checkpoint", mmap)
    missing = [key for key in _LOOKED_AT if not isinstance(content, dict) or key not in content]
    if missing:
        raise Damaged(f"{path} is no checkpoint of this program (no {', '.join(missing)}); choose another, "
                      "or load it as pretrained weights")
    return content


def _unpickle(path: Path, what: str, mmap: bool = False) -> Any:
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what} {path} does not exist") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise Damaged(
            f"{what} {path} is damaged or holds more than tensors and plain values; choose another"
        ) from error
    except Exception as error:  # damaged bytes can lead the reader to any of them
        reason = " ".join(str(error).split(".")[0].split()) or type(error).__name__
        raise Damaged(f"{what} {path} is damaged ({reason}); choose another") from error


# Random states


def random_state() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators, and of this rank's GPU where it has one."""
    legacy: Any = numpy.random.get_state()
    name, keys, *rest = legacy
    return {
        "torch": torch.get_rng_state(),
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to states that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    random.setstate(state["python"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# Weights alone


def load_weights(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by name, on the CPU, from a `.safetensors` file, a plain state dict or a checkpoint.

    A checkpoint is one of this program (its `state_dict`) or of torchvision's training script (its `model`). The
    `module.` that DDP puts before every name is dropped.

    Raises FileNotFoundError where there is no such file, and Damaged where it is truncated, or anything but tensors by
    name.
    """
    if path.suffix == ".safetensors":
        content: Any = _load_safetensors(path)
    else:
        content = _unpickle(path, "weights file")
        for key in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
    by_name = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not by_name or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise Damaged(f"weights file {path} holds something else than tensors by name; choose another")
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        path.open("rb").close()  # whose errors name the file
        return load_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"weights file {path} does not exist") from error
    except SafetensorError as error:
        raise Damaged(f"weights file {path} is damaged ({error}); choose another") from error


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Put weights into a model, every one of them; `source` names them in errors.

    Counters of batch norms may be missing: state dicts from before they existed are whole without them.

    Raises Misfit where names or shapes differ; the model is left as it was.
    """
    own = model.state_dict()
    differing = {
        "missing": [name for name in own if name not in state and not name.endswith("num_batches_tracked")],
        "unknown": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
            for name in own if name in state and state[name].shape != own[name].shape
        ],
    }
    words = [
        f"{len(names)} {how} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for how, names in differing.items() if names
    ]
    if words:
        raise Misfit(
            f"weights {source} do not fit the model: {'; '.join(words)}; choose their `arch` and `num_classes`"
        )
    model.load_state_dict(dict(state), strict=False)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's parameters and buffers as a `.safetensors` file, atomically."""
    from safetensors.torch import save as to_bytes

    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as file:
        file.write(to_bytes(tensors))
