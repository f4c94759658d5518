"""The cost of the training loop: images per second of `train_epoch` next to a bare torch loop.

    python benchmarks/loop.py [--arch resnet18] [--image-size 64] [--batch-size 16] [--iterations 2] [--rounds 21]
    python benchmarks/loop.py --arch resnet50 --image-size 224 --batch-size 256 --iterations 20 --amp \\
        --memory-format nhwc

Both train one and the same network on the same batches, held in memory, with torch's fused SGD: of two copies of a
network one can be 10 % slower than the other, by where its weights lie in memory. The exchange does nothing, so that
what is measured is the loop alone: its clocks and sums, the skipping of bad steps, the parameter groups. Both keep
freed memory, as main.py does: without it, whose gradients lie at the top of the heap decides more than the loops do.
The two take turns within one run, first one and then the other first, and the median of the rounds' ratios counts.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
from torch import Tensor, nn

from image_classification.allocator import keep_freed_memory
from image_classification.losses import training_loss
from image_classification.models import build
from image_classification.optim import parameter_groups, sgd
from image_classification.precision import MixedPrecisionOptimizer, Precision
from image_classification.training import train_epoch


class Held:
    """Batches held on the device."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.skipped: list[str] = []
        self.global_batch = len(batches[0][1])
        self.num_images = self.global_batch * len(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches[start:])

    def fingerprint(self) -> dict[str, int | str]:
        """Nothing that other ranks could have copies of."""
        return {}

    def close(self) -> None:
        """Nothing to end."""


class Idle:
    """An exchange that does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._yes = torch.tensor(True, device=device)

    def no_sync(self) -> nullcontext[None]:
        return nullcontext()

    def begin_step(self, loss_scale: float | Tensor = 1.0) -> None: ...

    def finish(self) -> Tensor:
        return self._yes

    def settle(self, applied: Tensor) -> None: ...

    def flush(self, loss_scale: float | Tensor = 1.0) -> None: ...

    def nonfinite_layer(self) -> str | None:
        return None


def bare_epoch(
    model: nn.Module, loader: Held, loss: nn.Module, optimizer: torch.optim.Optimizer, half: torch.dtype | None
) -> None:
    """The bare loop, to compare with. `half`: the type that autocast computes in, None without it."""
    model.train()
    for images, labels in loader.epoch(0):
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype=half, enabled=half is not None):
            batch_loss = loss(model(images), labels)
        batch_loss.backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=2, help="of each loop in each round")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--amp", action="store_true", help="autocast in half precision, in both loops")
    parser.add_argument("--memory-format", choices=("nchw", "nhwc"), default="nchw", help="in both loops")
    flags = parser.parse_args()

    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    images = torch.randn(flags.iterations, flags.batch_size, 3, flags.image_size, flags.image_size, device=device)
    labels = torch.randint(1000, (flags.iterations, flags.batch_size), device=device)
    layout = torch.channels_last if flags.memory_format == "nhwc" else torch.contiguous_format
    batches = [batch.contiguous(memory_format=layout) for batch in images]
    loader = Held(list(zip(batches, labels, strict=True)))
    loss = training_loss()

    precision = Precision.choose(device, amp=flags.amp)
    network = precision.convert(build(flags.arch))
    network.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = MixedPrecisionOptimizer(parameter_groups(network, weight_decay=1e-4), partial(sgd, lr=1e-3), precision)
    bare = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
    loops = {
        "train_epoch": lambda: train_epoch(network, loader, loss, optimizer, Idle(device), epoch=0, lr=1e-3),
        "bare loop": lambda: bare_epoch(network, loader, loss, bare, precision.autocast),
    }

    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(flags.rounds + 1):
        for name in loops if turn % 2 else reversed(loops):
            start = time.perf_counter()
            loops[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            speeds[name].append(loader.num_images / (time.perf_counter() - start))
    ratios = [mine / bare for mine, bare in zip(*(each[1:] for each in speeds.values()), strict=True)]  # 0 warms up

    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{chip}, {torch.get_num_threads()} threads; torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{flags.arch}, {flags.batch_size} images of {flags.image_size} px, {flags.rounds} rounds")
    for name, each in speeds.items():
        print(f"{name:12} {median(each[1:]):9.1f} images/s")
    print(f"ratio        {median(ratios):9.3f}  ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
