"""Checkpoints: all that a run needs to go on bit for bit, in one file that cannot run code.

A file holds one dictionary of tensors and plain values. The trainer fills it; this module looks at the first five
keys only, and knows neither models, optimizers nor ranks.

| key | value |
| --- | --- |
| `epoch` | epochs done, which is also the number of the next one |
| `iteration` | batches done of that next one: the sampler's position |
| `arch`, `num_classes` | the network that the weights fit |
| `state_dict` | the model's parameters, and its buffers as validation scores them: batch-norm statistics are averages |
| | over the ranks |
| `best_prec1` | the best top-1 so far, percent |
| `optimizer` | momentum, master weights, loss scale; the schedule is a function of the epoch and has no state |
| `images_per_iteration` | images of one batch of all ranks: `iteration` counts them |
| `metrics` | those of training in the epoch that `iteration` is in, by name |
| `memory_format` | order in memory, nchw or nhwc, of the values that compression and search remember |
| `widths` | layer name -> bits of its codes, 32 where it is not encoded |
| `searched` | whether a search chose those bits |
| `compressor` | its `name`, and its options: what compression remembers is of use to the same one only |
| `measured` | `times` from which a search for step time predicts, and the cluster to `simulate`, or none |
| `seed` | seed of the run, also where none was asked for |
| `world_size` | ranks that wrote it |
| `version` | version of the program that wrote it, for people: nothing depends on it |
| `arithmetic` | version of what compressors compute, 1 where it is missing |
| `ranks` | per rank: `random` (see `random_state`), `buffers` (batch-norm statistics), `exchange` (residuals and all |
| | other memory of its compressor) |
"""

import hashlib
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
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
    _compare_checksums(path, "checkpoint")
    for key, value in expected.items():
        if content.get(key) != value:
            raise Misfit(f"checkpoint {path} has {key} {content.get(key)}, and this run has {value}; "
                         "choose another checkpoint or workspace, or run it as it was")
    return content


def _compare_checksums(path: Path, what: str) -> None:
    """Raises Damaged where a file's content does not fit the checksums in it, at which torch does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # damaged bytes can lead the reader to any of them
        raise Damaged(f"{what} {path} is damaged ({error}); choose another") from error
    if broken:
        raise Damaged(f"{what} {path} is damaged (wrong checksum of {broken}); choose another")


def fingerprint(path: Path) -> str:
    """A digest of the checksums in a checkpoint that `load` has found good."""
    with zipfile.ZipFile(path) as archive:
        sums = [(entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


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
        if not path.is_file():
            warn(f"passed over: checkpoint {path} is no file")
            continue
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


def _unpickle(path: Path, what: str, mmap: bool = False, also: Sequence[Any] = ()) -> Any:
    """The content of a file of torch's; `also` holds types that it may be made of besides tensors and plain values."""
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what} {path} does not exist") from error
    try:
        with torch.serialization.safe_globals(list(also)):
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

_WEIGHTS = ("state_dict", "model")
_AVERAGED = ("state_dict_ema", "model_ema")
"""Keys of training scripts' checkpoints: timm's and ours, torchvision's."""

_WRAPPERS = ("module.", "_orig_mod.")
"""What DDP, a running average and torch.compile put before every name."""


class _Values:
    """What a training script was started with: read because it is in the file, and not looked at."""


# What the scripts of torchvision and timm put beside the weights. These types only hold values: none runs anything.
_HARMLESS = (
    (_Values, "argparse.Namespace"),
    numpy.dtype,
    *{type(numpy.dtype(kind)) for kind in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")},
    numpy._core.multiarray.scalar,  # type: ignore[attr-defined]
    (numpy._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]  # its name in 1.x
)


def load_weights(path: Path, tell: Callable[[str], None] = lambda line: None) -> dict[str, Tensor]:
    """Parameters and buffers by name, on the CPU, from a `.safetensors` file, a plain state dict or a checkpoint.

    A checkpoint is one of this program, of torchvision's training script or of timm's. Of the weights that were trained
    and a running average of them, the trained ones are taken, as timm's own scripts do unless they are asked for the
    average; a line to `tell` says so. The average serves where there is nothing else. Float32 masters take the place of
    the half-precision weights that they were rounded to. Prefixes of wrappers are dropped.

    Raises FileNotFoundError where there is no such file, and Damaged where it is truncated, or anything but tensors by
    name.
    """
    if path.suffix == ".safetensors":
        content: Any = _load_safetensors(path)
    else:
        content = _unpickle(path, "weights file", also=_HARMLESS)
        if zipfile.is_zipfile(path):  # else of torch before 1.6, without checksums
            _compare_checksums(path, "weights file")
    keys = [key for key in (*_WEIGHTS, *_AVERAGED) if isinstance(content, dict) and isinstance(content.get(key), dict)]
    if keys:
        averages = [key for key in keys if key in _AVERAGED]
        if averages and keys[0] not in _AVERAGED:
            tell(
                f"weights file {path} holds trained weights and a running average of them: '{keys[0]}' is taken; to "
                f"start from the average, save its '{averages[0]}' alone"
            )
        content = full_precision(content, content[keys[0]])
    by_name = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not by_name or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise Damaged(f"weights file {path} holds something else than tensors by name; choose another")
    return _unwrapped(content)


def full_precision(checkpoint: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a checkpoint, with float32 masters in place of the weights that were rounded from them."""
    optimizer = checkpoint.get("optimizer")
    masters = optimizer.get("masters") if isinstance(optimizer, dict) else None
    return {**state, **(masters if isinstance(masters, dict) else {})}


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what wrappers, one in another, have put before all names."""
    names = [name for name in state if name != "n_averaged"]  # a running average's count, which is no weight
    values = [state[name] for name in names]
    while prefix := next((each for each in _WRAPPERS if names and all(name.startswith(each) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, values, strict=True))


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


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], source: Path | str, *, head: str = "", reset_head: bool = False
) -> None:
    """Put weights into a model, every one of them; `source` names them in errors.

    `head` is the name of the module that tells the classes apart. With `reset_head` it keeps the model's own weights.
    Counters of batch norms may be missing: state dicts from before they existed are whole without them.

    Raises Misfit where names or shapes differ; the model is left as it was.
    """
    own = model.state_dict()
    in_head = [name for name in own if head and name.startswith(head + ".")]
    if reset_head:
        state = {**state, **{name: own[name] for name in in_head}}
    differing = {
        "missing": [name for name in own if name not in state and not name.endswith("num_batches_tracked")],
        "unknown": [name for name in state if name not in own],
        "of another shape": [name for name in own if name in state and state[name].shape != own[name].shape],
    }
    words = []
    for how, names in differing.items():
        shown = [
            f"{name} {list(state[name].shape)} for {list(own[name].shape)}" if name in own and name in state else name
            for name in names[:3]
        ]
        if names:
            words.append(f"{len(names)} {how} ({', '.join(shown)}{', ...' if len(names) > 3 else ''})")
    if words:
        remedy = "choose their `arch` and `num_classes`"
        if {name for names in differing.values() for name in names} <= set(in_head):
            remedy = "choose their `num_classes`, or `reset_head` for a classifier that is drawn anew"
        raise Misfit(f"weights {source} do not fit the model: {'; '.join(words)}; {remedy}")
    model.load_state_dict(dict(state), strict=False)


def save_weights(model: nn.Module, path: Path, masters: Mapping[str, Tensor] | None = None) -> None:
    """Write a model's parameters and buffers as a `.safetensors` file, atomically.

    `masters` are float32 values of some parameters, written in place of the half-precision ones.
    """
    from safetensors.torch import save as to_bytes

    state = {**model.state_dict(), **(masters or {})}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with replacing(path) as file:
        file.write(to_bytes(tensors))
