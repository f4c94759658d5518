"""Backends `dali-cpu` and `dali-gpu`: NVIDIA DALI decodes, crops and resizes, in threads.

Order, shards and random views are ours, the same as the pytorch backend's: DALI is given each file's bytes and the
view to show. So it draws no random number, and an epoch can start anywhere.

DALI decodes these as Pillow does: complete JPEG and PNG files in RGB or gray. All else (CMYK, palettes,
transparency, 16 bits, other formats, incomplete files) goes through Pillow, file by file, so that the backends
accept, refuse and skip the same files, but for one kind: of a complete file that is damaged in its middle DALI may
show what is left, where Pillow refuses. Where DALI fails, Pillow decodes that whole batch, and a warning says so.
"""

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from image_classification.data.images import render
from image_classification.data.loader import FolderLoader, Pixels, assemble, build_folder_loaders, stack
from image_classification.data.options import DataOptions
from image_classification.data.samples import Sample, Samples
from image_classification.data.views import View

# Batches in the making while one is in use.
_LOOK_AHEAD = 2

# The last bytes of a complete file. Whether a truncated one is refused must not depend on what its view shows.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def build_cpu(options: DataOptions) -> tuple[FolderLoader, FolderLoader]:
    return build_folder_loaders(options, lambda samples, _: DaliReader(samples, torch.device("cpu")))


def build_gpu(options: DataOptions) -> tuple[FolderLoader, FolderLoader]:
    """The same pipeline with files decoded on the GPU, where DALI can."""
    if options.device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"dali-gpu decodes on a CUDA device, and this process trains on {options.device}; use dali-cpu"
        )
    index = torch.cuda.current_device() if options.device.index is None else options.device.index
    return build_folder_loaders(options, lambda samples, _: DaliReader(samples, torch.device("cuda", index)))


class _Encoded(NamedTuple):
    """A file that DALI will decode."""

    data: np.ndarray
    """uint8 [bytes]."""
    view: View


_Content = _Encoded | np.ndarray
"""Content of a file: DALI's input, or Pillow's pixels."""


class DaliReader:
    """File threads read ahead of the one thread that runs DALI's pipeline; DALI has threads of its own."""

    def __init__(self, samples: Samples, device: torch.device) -> None:
        self._samples = samples
        self._device = device
        self._threads = max(1, samples.options.workers)
        self._files = ThreadPoolExecutor(self._threads, thread_name_prefix="files")
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="dali")
        # Of its own, so that decoding waits for no training step; without a GPU there is none.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pipeline: Any = None

    def read(self, epoch: int, batches: Sequence[np.ndarray]) -> Iterator[Pixels]:
        coming: deque[tuple[Future[Pixels], list[Future[Sample[_Content]]]]] = deque()
        try:
            for batch in batches:
                files = [self._files.submit(self._prepare, epoch, int(index)) for index in batch]
                coming.append((self._decoder.submit(self._decode, epoch, batch, files), files))
                if len(coming) > _LOOK_AHEAD:
                    yield coming.popleft()[0].result()
            while coming:
                yield coming.popleft()[0].result()
        finally:
            for decoded, files in coming:
                decoded.cancel()
                for file in files:
                    file.cancel()

    def _prepare(self, epoch: int, index: int) -> Sample[_Content]:
        def prepare(data: bytes, image: Image.Image, view: View) -> _Content:
            ending = _ENDINGS.get(image.format or "")
            if ending and data.endswith(ending) and image.mode in ("RGB", "L"):
                return _Encoded(np.frombuffer(data, dtype=np.uint8), view)
            return render(image, view, self._samples.options.image_size)

        return self._samples.load(epoch, index, prepare)

    def _decode(
        self, epoch: int, batch: np.ndarray, files: Sequence[Future[Sample[_Content]]]
    ) -> Pixels:
        samples = [file.result() for file in files]
        if self._pipeline is None:
            self._pipeline = _pipeline(self._samples.options, self._threads, self._device)
        try:
            with torch.cuda.stream(self._stream):
                return assemble(samples, self._pixels)
        except RuntimeError as error:
            self._pipeline = None  # of no use after an error
            reason = " ".join(str(error).split())
            warnings.warn(f"DALI failed on a batch, Pillow decodes it: {reason}", stacklevel=2)
        return assemble([self._samples.rendered(epoch, int(index)) for index in batch], stack)

    def _pixels(self, contents: Sequence[_Content]) -> Tensor:
        """uint8 [B, S, S, 3], on the device that decodes."""
        size = self._samples.options.image_size
        pin = self._samples.options.device.type == "cuda" and self._device.type == "cpu"
        pixels = torch.empty(
            (len(contents), size, size, 3), dtype=torch.uint8, device=self._device, pin_memory=pin
        )
        encoded = {row: content for row, content in enumerate(contents) if isinstance(content, _Encoded)}
        rendered = {row: content for row, content in enumerate(contents) if isinstance(content, np.ndarray)}
        if encoded:
            pixels[list(encoded)] = self._run(list(encoded.values()))
        if rendered:
            pixels[list(rendered)] = stack(list(rendered.values())).to(self._device)
        if self._stream is not None:
            self._stream.synchronize()  # DALI reuses its output at the next run
        return pixels

    def _run(self, encoded: Sequence[_Encoded]) -> Tensor:
        """DALI's pixels, uint8 [B, S, S, 3], until its next run."""
        views = [file.view for file in encoded]
        (images,) = self._pipeline.run(
            files=[file.data for file in encoded],
            # Pillow's (left, top, right, bottom) are DALI's start (top, left) and end (bottom, right)
            box_start=np.array([view.box[1::-1] for view in views], dtype=np.int32),
            box_end=np.array([view.box[:1:-1] for view in views], dtype=np.int32),
            region_start=np.array([view.region[1::-1] for view in views], dtype=np.float32),
            region_end=np.array([view.region[:1:-1] for view in views], dtype=np.float32),
            flip=np.array([view.flip for view in views], dtype=np.int32),
        )
        return from_dlpack(images.as_tensor())

    def close(self) -> None:
        self._files.shutdown(cancel_futures=True)
        self._decoder.shutdown(cancel_futures=True)
        self._pipeline = None


def _pipeline(options: DataOptions, threads: int, device: torch.device) -> Any:
    """DALI's realization of a view."""
    dali: Any = import_module("nvidia.dali")
    fn, types = dali.fn, dali.types

    @dali.pipeline_def(
        batch_size=options.batch_size,
        num_threads=threads,
        device_id=None if device.type == "cpu" else device.index,
        prefetch_queue_depth=1,  # looking ahead is the reader's business
    )
    def realize() -> Any:
        def coordinates(name: str, dtype: Any) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=1)

        images = fn.decoders.image_slice(
            fn.external_source(name="files", dtype=types.UINT8, ndim=1),
            device="cpu" if device.type == "cpu" else "mixed",
            start=coordinates("box_start", types.INT32),
            end=coordinates("box_end", types.INT32),
            axis_names="HW",
            adjust_orientation=False,  # nor does Pillow
            jpeg_fancy_upsampling=True,  # as Pillow does
        )
        images = fn.resize(
            images,
            size=[options.image_size, options.image_size],
            roi_start=coordinates("region_start", types.FLOAT),
            roi_end=coordinates("region_end", types.FLOAT),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        return fn.flip(images, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))

    pipeline = realize()
    pipeline.build()
    return pipeline
