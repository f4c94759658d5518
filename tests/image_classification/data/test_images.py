"""Files that are no plain RGB JPEG: converted where it is an image, named or skipped where it is not."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from image_classification import data
from tests.support.image_folders import options, picture, pixels, same, write_folder

FOLDER_BACKENDS = ["pytorch", "dali-cpu"]
both = pytest.mark.parametrize("backend", FOLDER_BACKENDS)


def encoded(image: Image.Image, form: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 3.6 billion pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


PICTURE = picture(60, 50, seed=3)
TALL = np.linspace(0, 65535, 3000).reshape(60, 50).astype(np.uint16)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # orientation: turned by 90 degrees
IMAGES = {
    "cmyk.jpg": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "gray.jpg": encoded(PICTURE.convert("L"), "JPEG"),
    "progressive.jpg": encoded(PICTURE, "JPEG", progressive=True),
    "rotated.jpg": encoded(PICTURE, "JPEG", exif=ROTATED),
    "junk_behind.jpg": encoded(PICTURE, "JPEG") + b"junk",
    "palette.png": encoded(PICTURE.convert("P"), "PNG", transparency=b"\x00\x80\xff"),
    "rgba.png": encoded(PICTURE.convert("RGBA"), "PNG"),
    "gray_alpha.png": encoded(PICTURE.convert("LA"), "PNG"),
    "bit.png": encoded(PICTURE.convert("1"), "PNG"),
    "sixteen_bits.png": encoded(Image.fromarray(TALL), "PNG"),
    "a_jpeg_called.png": encoded(PICTURE, "JPEG"),
    "a_gif_called.jpg": encoded(PICTURE, "GIF"),
    "pixel.png": encoded(picture(1, 1, seed=1), "PNG"),
    "pixel.jpg": encoded(picture(1, 1, seed=1), "JPEG"),
    "line.jpg": encoded(picture(1, 2000, seed=1), "JPEG"),
    "x.webp": encoded(PICTURE, "WEBP"),
    "x.tiff": encoded(PICTURE, "TIFF"),
    "x.bmp": encoded(PICTURE, "BMP"),
    "x.pgm": encoded(PICTURE.convert("L"), "PPM"),
}
BAD = {
    "empty.jpg": b"",
    "text.jpg": b"<html>404</html>",
    "header_only.jpg": encoded(PICTURE, "JPEG")[:200],
    "truncated.jpg": encoded(PICTURE, "JPEG")[:-300],
    "truncated_by_2.jpg": encoded(PICTURE, "JPEG")[:-2],
    "truncated.png": encoded(PICTURE, "PNG")[:1500],
    "bomb.png": bomb(),
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


def with_file(root, name: str, content: bytes, split: str = "train"):
    """The name is that of the split's only file of class0."""
    folder = root / split / "class0"
    for path in folder.iterdir():
        path.unlink()
    (folder / name).write_bytes(content)
    return folder / name


def read(root, backend, train=True, **changes):
    """All batches of an epoch, and how many files were skipped."""
    loaders = data.build(options(root, backend, **changes))
    chosen = loaders[0 if train else 1]
    try:
        return list(chosen.epoch(0)), len(chosen.skipped)
    finally:
        for loader in loaders:
            loader.close()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_of_image_is_converted_alike_by_both_backends(tmp_path, name):
    write_folder(tmp_path, train=8, val=8)
    for split in ("train", "val"):
        with_file(tmp_path, name, IMAGES[name], split)
    for train in (True, False):
        shown = [read(tmp_path, backend, train, batch_size=5)[0] for backend in FOLDER_BACKENDS]
        assert [labels.tolist().count(0) for _, labels in shown[0]] == [1]
        for (images, labels), (others, other_labels) in zip(*shown, strict=True):
            assert torch.equal(labels, other_labels)
            assert (pixels(images) - pixels(others)).abs().mean((1, 2, 3)).max() <= 2


@both
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", BAD)
def test_an_undecodable_file_is_an_error_that_names_it(tmp_path, backend, name, workers):
    path = with_file(write_folder(tmp_path, train=8), name, BAD[name])
    words = r"^[^\n]* is not a readable image \([^\n]+\); replace or remove it, or pass `skip_bad_images`$"
    with pytest.raises(data.BadImage, match=words) as caught:
        read(tmp_path, backend, batch_size=5, workers=workers)
    assert str(caught.value).startswith(str(path))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", BAD)
def test_in_training_the_next_file_stands_in_and_the_steps_stay(tmp_path, name):
    write_folder(tmp_path, train=16)
    with_file(tmp_path, name, BAD[name])
    runs = [read(tmp_path, backend, batch_size=3, skip_bad_images=True) for backend in FOLDER_BACKENDS]
    for batches, skipped in runs:
        assert [len(labels) for _, labels in batches] == [3, 3, 3]
        assert all((labels == 1).all() for _, labels in batches)
        assert skipped == 1
    for (images, _), (others, _) in zip(runs[0][0], runs[1][0], strict=True):
        assert (pixels(images) - pixels(others)).abs().mean((1, 2, 3)).max() <= 2


@both
def test_a_stand_in_shows_a_view_of_its_own(tmp_path, backend):
    write_folder(tmp_path, train=4)
    with_file(tmp_path, "bad.jpg", b"")
    ((images, _),), _ = read(tmp_path, backend, batch_size=3, skip_bad_images=True)
    assert len({image.numpy().tobytes() for image in images}) == 3


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_in_validation_bad_images_are_left_out_and_no_other_counts_twice(tmp_path, backend, workers):
    write_folder(tmp_path, val=13)
    clean, none = read(tmp_path, backend, train=False, batch_size=1)
    assert (len(clean), none) == (13, 0)
    for name in ("000.jpg", "004.jpg"):  # the first and the third of the list
        (tmp_path / "val" / "class0" / name).write_bytes(b"")
    changes = {"train": False, "skip_bad_images": True, "workers": workers}
    batches, skipped = read(tmp_path, backend, batch_size=4, **changes)
    assert ([len(labels) for _, labels in batches], skipped) == ([2, 4, 4, 1], 2)
    batches, skipped = read(tmp_path, backend, batch_size=1, **changes)
    assert skipped == 2
    assert same(batches, [clean[1], *clean[3:]])


@both
def test_every_rank_has_its_steps_whatever_is_skipped(tmp_path, backend):
    write_folder(tmp_path, train=12)
    for path in (tmp_path / "train" / "class0").iterdir():
        path.write_bytes(b"")
    counts = []
    for rank in (0, 1):
        batches, skipped = read(tmp_path, backend, rank=rank, world_size=2, batch_size=2, skip_bad_images=True)
        assert [len(labels) for _, labels in batches] == [2, 2, 2]
        counts.append(skipped)
    # Samples 0 to 5 pass over what is left of class0 from themselves on.
    assert sum(counts) == 6 + 5 + 4 + 3 + 2 + 1


@both
def test_where_nothing_decodes_the_folder_is_named(tmp_path, backend):
    write_folder(tmp_path, train=4)
    for path in (tmp_path / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(data.BadImage, match=r"/train holds no readable image$"):
        read(tmp_path, backend, skip_bad_images=True)


@both
def test_a_file_that_vanished_is_an_error_even_where_bad_images_are_skipped(tmp_path, backend):
    write_folder(tmp_path, train=4)
    train, val = data.build(options(tmp_path, backend, skip_bad_images=True))
    (tmp_path / "train" / "class0" / "000.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"000\.jpg"):
        list(train.epoch(0))
    train.close()
    val.close()


GRAY = np.arange(0, 65536, 32, dtype=np.uint16).reshape(32, 64)


def deep_images() -> dict[str, bytes]:
    """The same gray image of 16 bits in every format that can hold it."""
    image = Image.fromarray(GRAY)
    return {
        "deep.png": encoded(image, "PNG"),
        "deep.tif": encoded(image, "TIFF"),
        "deep.pgm": b"P5 64 32 65535\n" + GRAY.astype(">u2").tobytes(),
        "deep.ppm": b"P6 64 32 65535\n" + GRAY.repeat(3).astype(">u2").tobytes(),
    }


@both
@pytest.mark.parametrize("name", deep_images())
def test_sixteen_bits_are_scaled_to_eight(tmp_path, backend, name):
    write_folder(tmp_path, val=2)
    with_file(tmp_path, name, deep_images()[name], "val")
    changes = {"train": False, "batch_size": 2, "image_size": 28}
    deep = read(tmp_path, backend, **changes)[0][0][0]
    with_file(tmp_path, "flat.png", encoded(Image.fromarray((GRAY / 257).round().astype(np.uint8)), "PNG"), "val")
    flat = read(tmp_path, backend, **changes)[0][0][0]
    assert (pixels(deep) - pixels(flat)).abs().max() <= 1.01


@both
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_which_nothing_says_what_is_white_are_refused(tmp_path, backend, dtype):
    write_folder(tmp_path, val=2)
    with_file(tmp_path, "range.tif", encoded(Image.fromarray(GRAY.astype(dtype)), "TIFF"), "val")
    kinds = {np.int32: "32-bit integers", np.float32: "floats"}
    with pytest.raises(data.BadImage, match=rf"range\.tif is not a readable image \(its pixels are {kinds[dtype]}, "):
        read(tmp_path, backend, train=False)


@both
def test_a_pipe_is_no_image(tmp_path, backend):
    path = with_file(write_folder(tmp_path), "pipe.png", b"", "val")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(data.BadImage, match=r"pipe\.png is not a readable image \(it is no regular file\)"):
        read(tmp_path, backend, train=False)


@both
def test_what_was_passed_over_is_named_with_its_reason(tmp_path, backend):
    path = with_file(write_folder(tmp_path, train=8), "bad.jpg", b"")
    train, val = data.build(options(tmp_path, backend, batch_size=5, skip_bad_images=True))
    list(train.epoch(0))
    (told,) = train.skipped
    assert re.fullmatch(rf"{re.escape(str(path))} \(.+\)", told)
    train.close()
    val.close()
