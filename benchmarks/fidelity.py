"""Fidelity and cost of every compressor on a gradient: relative errors and bits per value.

    python benchmarks/fidelity.py [-o docs/fidelity.md]

Every row of the registry, from a fresh start, on normal numbers and on a real gradient: resnet18, some steps into
training on handwritten digits.
"""

import argparse
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import compression
from benchmarks.search import machine
from compression import COMPRESSORS, Solo
from compression.averagers import Averager, OneHop
from compression.gradients import Gradients
from compression.layers import layers_of
from image_classification.models import build

# Values of the option that sets how much is sent; a compressor is measured at those of the first one that it takes.
SETTINGS: dict[str, tuple[Any, ...]] = {"bits": (2, 4, 8), "ratio": (0.001, 0.01, 0.1), "rank": (1, 4, 16)}
NORMAL = {"normal": torch.randn(512, 256, 3, 3, generator=torch.Generator().manual_seed(0))}

PAGE = """# Fidelity

What a compressor keeps of a gradient g in one encoding, |decoded - g| / |g| over all layers, and what it sends
for it: bits per value, with scales, indices and the layers that stay float32. On the left 512 x 256 x 3 x 3
normal numbers, on the right resnet18's gradient (10 classes, 32 pixels, 64 images) {steps} steps into training
on scikit-learn's digits.

{table}

Options not named have their defaults: buckets of 512 values, no error feedback. An unbiased code may err by
more than the gradient's length and still be right on average: errors of ranks and steps cancel. The others
(1bit, top-k, PowerSGD) need error feedback, which sends later what is missing here. What remembers is measured
in its first step; PowerSGD's factors improve from step to step.

Made by `python benchmarks/fidelity.py -o docs/fidelity.md` on {machine}; Python {python}, torch {torch}.
"""


def real_gradient(steps: int, batch_size: int = 64) -> dict[str, Tensor]:
    """resnet18's gradients after some steps of training on the digits, at 32 pixels."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32))[:, None] / 8 - 1
    images = nn.functional.interpolate(images.expand(-1, 3, -1, -1), size=32, mode="bilinear")
    labels = torch.from_numpy(digits.target)
    model = build("resnet18", "classic", 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps + 1):
        optimizer.step()  # of the step before: the last gradients stay
        optimizer.zero_grad()
        chosen = torch.randint(len(labels), (batch_size,))
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def variants(name: str) -> Iterator[dict[str, Any]]:
    """The options at which a compressor is measured."""
    row = COMPRESSORS[name]
    option = next((option for option in SETTINGS if option in row.takes), None)
    if option is None:
        yield {}
        return
    for value in SETTINGS[option]:
        if option != "bits" or value >= row.min_bits:
            yield {option: value}


def fidelity(name: str, options: Mapping[str, Any], gradient: Mapping[str, Tensor]) -> tuple[float, float]:
    """(bits per value, |decoded - g| / |g|) of one encoding of all layers on a single rank."""
    compressor = compression.build(name, **options)
    layers = layers_of([(layer, tuple(values.shape)) for layer, values in gradient.items()], compressor.bucket_size)
    averager: Averager = compressor.averager(layers, Solo(), seed=0)
    if COMPRESSORS[name].quantizer is not None:  # its averager encodes twice
        codec = compression.codec(name, **options)
        averager = OneHop(lambda layer: codec, layers, Solo(), seed=0)
    flat = torch.cat([values.reshape(-1) for values in gradient.values()])
    given = flat.clone()
    starts = np.cumsum([0, *(layer.numel for layer in layers)])[:-1].tolist()
    averager.average_(Gradients(flat, tuple(gradient), tuple(starts)), step=0)
    error = (flat.double() - given.double()).norm() / given.double().norm()
    return 8 * averager.encoded_bytes / len(given), float(error)


def table(gradient: Mapping[str, Tensor]) -> Iterator[str]:
    """The lines of the table, in Markdown."""
    yield "| compressor | option | N(0, 1): bits/value | error | resnet18: bits/value | error |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for name in COMPRESSORS:
        for options in variants(name):
            (bits, error), (real_bits, real_error) = (fidelity(name, options, g) for g in (NORMAL, gradient))
            setting = ", ".join(f"{option} {value}" for option, value in options.items())
            yield f"| {name} | {setting} | {bits:.3f} | {error:.4f} | {real_bits:.3f} | {real_error:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="write the page to this file too")
    parser.add_argument("--steps", type=int, default=10, help="training steps before the gradient is taken")
    flags = parser.parse_args()
    text = PAGE.format(
        steps=flags.steps,
        table="\n".join(table(real_gradient(flags.steps))),
        machine=machine(),
        python=platform.python_version(),
        torch=torch.__version__,
    )
    print(text, end="")
    if flags.output:
        flags.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
