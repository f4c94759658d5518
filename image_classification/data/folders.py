"""Folders: the contents of a data set on disk, found and checked by listing alone."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's IMG_EXTENSIONS, in any case of letters. Files that end otherwise are ignored, and so are files and
folders whose names begin with a dot: what editors, notebooks and macOS leave beside images may end like them."""

SIZES_COMPARED = 1000

_LAYOUT = "expected DIR/train/CLASS/* and DIR/val/CLASS/*"


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, in torchvision's ImageFolder order.

    Names are a numpy array, not a list: a list of a million strings would be copied into every worker as soon as
    their reference counts move.
    """

    folder: Path
    classes: tuple[str, ...]
    names: np.ndarray
    """Bytes [N]: CLASS/FILE, relative to the folder."""
    labels: np.ndarray
    """int64 [N]: positions in `classes`."""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.names[index])

    def fingerprint(self) -> dict[str, int | str]:
        """What two copies of a split have in common: counts, digests of all names and of some files' sizes.

        The sizes are those of `SIZES_COMPARED` images, evenly spread: a million would take a network's disk minutes.

        Raises OSError where one of these is not there.
        """
        some = range(0, len(self), max(1, len(self) // SIZES_COMPARED))
        sizes = [self.path(index).stat().st_size for index in some]
        digest_of = {
            "class names": "\n".join(self.classes).encode(errors="surrogateescape"),
            "file names": b"\n".join(self.names.tolist()),
            "file sizes": repr(sizes).encode(),
        }
        digests = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in digest_of.items()}
        return {"number of classes": len(self.classes), "number of images": len(self)} | {
            f"digest of {name}": digest for name, digest in digests.items()
        }


def list_splits(root: Path, num_classes: int, *, train: bool = True, val: bool = True) -> tuple[Split, Split]:
    """The train and the validation split below `root`; classes are the sorted folder names.

    A split that is not needed (`train` or `val` False) may be missing, and is empty. Where both are there, they name
    the same classes all the same: a label is a class's place among them.

    Raises ValueError for a missing or empty folder, classes that differ between the splits, or more than `num_classes`;
    OSError for a folder that cannot be read.
    """
    if not root.is_dir():
        raise ValueError(
            f"data folder {root} {'is not a folder' if root.exists() else 'does not exist'}; {_LAYOUT}, "
            "or the word digits for the embedded data set"
        )
    needed = [name for name, is_needed in (("train", train), ("val", val)) if is_needed]
    for name in needed:
        if not (root / name).is_dir():
            raise ValueError(f"data folder {root} has no folder {name}; {_LAYOUT}")
        if not _class_folders(root / name):
            raise ValueError(f"{root / name} holds no class folders; {_LAYOUT}")
    there = (name for name in ("train", "val") if (root / name).is_dir())
    classes = {name: names for name in there if (names := _class_folders(root / name))}
    if len(classes) == 2:
        _check_alike(root, classes["train"], classes["val"])
    shared = classes[needed[0]]
    if len(shared) > num_classes:
        raise ValueError(
            f"{root / needed[0]} holds {len(shared)} classes, more than the {num_classes} of the "
            f"model; use `num_classes` {len(shared)}"
        )
    listed = [
        _list_images(root / name, shared) if name in needed else Split(root / name, shared, *_no_images())
        for name in ("train", "val")
    ]
    return listed[0], listed[1]


def _check_alike(root: Path, train: tuple[str, ...], val: tuple[str, ...]) -> None:
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if only_train or only_val:
        raise ValueError(
            f"{root}/train and {root}/val name different classes: only train has {_some(only_train)}, "
            f"only val has {_some(only_val)}; give both the same class folders"
        )


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_hidden(entry.name)))


def _no_images() -> tuple[np.ndarray, np.ndarray]:
    """Names and labels of a split that is not needed."""
    return np.array([], dtype=np.bytes_), np.array([], dtype=np.int64)


def _list_images(folder: Path, classes: tuple[str, ...]) -> Split:
    names: list[bytes] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        found = _images_below(folder, name)
        names.extend(found)
        labels.extend([label] * len(found))
        if not found:
            empty.append(name)
    if empty:
        raise ValueError(
            f"{folder} has class folders without an image: {_some(empty)}; add images "
            f"({' '.join(IMAGE_SUFFIXES)}) or remove the folders from train and val"
        )
    return Split(folder, classes, np.array(names), np.array(labels, dtype=np.int64))


def _images_below(folder: Path, name: str) -> list[bytes]:
    """CLASS/FILE of every image in a class folder and the folders below it; a folder that links lead to twice once."""
    walked: list[tuple[str, list[str]]] = []
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder / name, followlinks=True, onerror=_raise):
        folders[:] = sorted(each for each in folders if not _is_hidden(each))  # which os.walk goes down into
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        walked.append((parent, files))
    found: list[bytes] = []
    for parent, files in sorted(walked):
        below = os.path.relpath(parent, folder)
        found.extend(
            os.fsencode(os.path.join(below, file))
            for file in sorted(files)
            if file.lower().endswith(IMAGE_SUFFIXES) and not _is_hidden(file)
        )
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _raise(error: OSError) -> None:
    raise error


def _some(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
