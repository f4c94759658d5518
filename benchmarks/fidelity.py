"""Fidelity and cost of every compressor on gradients: relative errors and bits per value.

    python benchmarks/fidelity.py [-o docs/fidelity.md]

Four tables. Every row of the registry, in one encoding from a fresh start, on normal numbers and on a real gradient:
resnet18, some steps into training on handwritten digits; beside them, schemes of GRACE by their formulas. The sum of
20 steps' gradients, for what remembers. Averages over 1, 2, 4 and 8 ranks, whose gradients differ or are alike. What
EDEN's rotation and its levels each bring.
"""

import argparse
import functools
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from compression.codecs.base import decoded
from compression.codecs.eden import Eden
from compression.codecs.quantizers import MaxMin
from compression.gradients import Gradients
from compression.kernels.reference.rotations import Rotations
from compression.layers import Layer, layers_of
from compression.limits import TINY
from compression.network.threads import ThreadCollectives, run_ranks
from compression.randomness import Draws
from image_classification.models import build

# Values of the option that sets how much is sent; a compressor is measured at those of the first one that it takes.
SETTINGS: dict[str, tuple[Any, ...]] = {"bits": (1, 2, 3, 4, 8), "ratio": (0.001, 0.01, 0.1), "rank": (1, 4, 16)}
WHOLE_LAYERS = ("maxmin", "norm_uniform", "exponential", "terngrad")  # measured with one bucket a layer, too
SUMMED = 20  # steps of the second table
WORLDS = (1, 2, 4, 8)  # ranks of the third
NORMAL = {"normal": torch.randn(512, 256, 3, 3, generator=torch.Generator().manual_seed(0))}

PAGE = """# Fidelity

What a compressor keeps of a gradient g in one encoding, |decoded - g| / |g| over all layers, and what it sends
for it: bits per value, with scales, indices and the layers that stay float32. On the left 512 x 256 x 3 x 3
normal numbers, on the right resnet18's gradient (10 classes, 32 pixels, 64 images) {steps} steps into training
on scikit-learn's digits.

{table}

Options not named have their defaults: buckets of 512 values, no error feedback; *whole layers* are buckets of -1. An
unbiased code may err by more than the gradient's length and still be right on average: errors of ranks and steps
cancel. The others (1bit, top-k, PowerSGD) need error feedback, which sends later what is missing here. What remembers
is measured in its first step. *GRACE* rows are that library's schemes (Xu et al., ICDCS 2021), computed from their
formulas with one scale for each tensor, at the bits that it sends: 8-bit integers for codes of fewer bits, 64-bit
indices.

## The sum of {summed} steps

What reaches the weights of {summed} steps of that training on one rank: |sum of averages - sum of gradients| over the
latter. Errors that are unbiased average out, those that are remembered are sent later, and lost ones add up. DGC has no
momentum here, with which it sends something else than the gradient.

{sums}

## Averages of several ranks

The error of the average, relative to the true average, through the two hops of a quantizer; one rank alone encodes
both. The last rows are of other averagers, in their first step. *Different*: every rank has
the gradient of another step, and their average is shorter than each, so that relative errors grow with W; *alike*: all
have the same. Hop one's errors are independent and average out; hop two encodes the average once, and its error stays.
Where gradients are alike that is plain: with any number of ranks the error is about that of one encoding, in the first
table; terngrad's, whose hop two does not clip, comes down to it. `second_hop_bits` gives averages more bits, and leaves
hop one's error, which falls with W. The bits a value are the mean of both hops.

{averages}

## What a rotation and levels bring

Squared error of one encoding, |decoded - g|^2 / |g|^2, in buckets of 512: max-min as it is; max-min of buckets that
are rotated at random as EDEN does it; EDEN, whose levels are those for normal values, and whose scale makes it
unbiased. The rotation brings most where gradients have outliers, the levels most at few bits.

{ablation}

Made by `python benchmarks/fidelity.py -o docs/fidelity.md` on {machine}; Python {python}, torch {torch}.
"""


def real_gradients(steps: int, batch_size: int = 64) -> list[dict[str, Tensor]]:
    """resnet18's gradients of some steps of training on the digits, at 32 pixels."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32))[:, None] / 8 - 1
    images = nn.functional.interpolate(images.expand(-1, 3, -1, -1), size=32, mode="bilinear")
    labels = torch.from_numpy(digits.target)
    model = build("resnet18", "classic", 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    gradients = []
    for _ in range(steps):
        optimizer.zero_grad()
        chosen = torch.randint(len(labels), (batch_size,))
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return gradients


def variants(name: str) -> Iterator[dict[str, Any]]:
    """The options at which a compressor is measured."""
    row = COMPRESSORS[name]
    option = next((option for option in SETTINGS if option in row.takes), None)
    if option is None:
        yield {}
        if name in WHOLE_LAYERS:
            yield {"bucket_size": -1}
        return
    for value in SETTINGS[option]:
        if option != "bits" or value >= row.min_bits:
            yield {option: value}
            if name in WHOLE_LAYERS:
                yield {option: value, "bucket_size": -1}


def packed(gradient: Mapping[str, Tensor]) -> Gradients:
    """A gradient's layers in a buffer of their own."""
    return Gradients.packed({name: values.reshape(-1) for name, values in gradient.items()})


def layers_like(gradient: Mapping[str, Tensor], bucket_size: int) -> tuple[Layer, ...]:
    """The layers of a gradient."""
    return layers_of([(name, tuple(values.shape)) for name, values in gradient.items()], bucket_size)


def fidelity(name: str, options: Mapping[str, Any], gradient: Mapping[str, Tensor]) -> tuple[float, float]:
    """(bits per value, |decoded - g| / |g|) of one encoding of all layers on a single rank."""
    compressor = compression.build(name, **options)
    layers = layers_like(gradient, compressor.bucket_size)
    averager: Averager = compressor.averager(layers, Solo(), seed=0)
    if COMPRESSORS[name].quantizer is not None:  # its averager encodes twice
        codec = compression.codec(name, **options)
        averager = OneHop(lambda layer: codec, layers, Solo(), seed=0)
    averaged, given = packed(gradient), packed(gradient).flat
    averager.average_(averaged, step=0)
    error = (averaged.flat.double() - given.double()).norm() / given.double().norm()
    return 8 * averager.encoded_bytes / len(given), float(error)


def table(gradient: Mapping[str, Tensor]) -> Iterator[str]:
    """The lines of the table, in Markdown."""
    yield "| compressor | option | N(0, 1): bits/value | error | resnet18: bits/value | error |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for name in COMPRESSORS:
        for options in variants(name):
            (bits, error), (real_bits, real_error) = (fidelity(name, options, g) for g in (NORMAL, gradient))
            row = f"{bits:.3f} | {error:.4f} | {real_bits:.3f} | {real_error:.4f}"
            yield f"| {name} | {in_words(options)} | {row} |"
    for (name, bits, error), (_, real_bits, real_error) in zip(grace(NORMAL), grace(gradient), strict=True):
        yield f"| {name} |  | {bits:.3f} | {error:.4f} | {real_bits:.3f} | {real_error:.4f} |"


def grace(gradient: Mapping[str, Tensor]) -> Iterator[tuple[str, float, float]]:
    """(name, bits per value, error) of schemes of GRACE, tensor by tensor.

    QSGD: |v| sign(x) floor(q |x| / |v| + U) / q. TernGrad: x clipped at 2.5 deviations, then s sign(x) with probability
    |x| / s, s the largest magnitude. 1-bit: the mean of the negative and that of the other values. Top-k: the largest
    1 % as they are.
    """
    generator = torch.Generator().manual_seed(1)  # another seed than that of the normal numbers

    def qsgd(x: Tensor, q: int) -> Tensor:
        norm = x.norm().clamp_min(TINY)
        return norm * x.sign() * torch.floor(q * x.abs() / norm + torch.rand(x.shape, generator=generator)) / q

    def terngrad(x: Tensor) -> Tensor:
        bound = 2.5 * float(x.std(unbiased=False))
        x = x.clamp(-bound, bound)
        s = x.abs().max()
        return s * x.sign() * (torch.rand(x.shape, generator=generator) < x.abs() / s.clamp_min(TINY))

    def one_bit(x: Tensor) -> Tensor:
        negative = x < 0
        below, above = (x[mask].mean() if mask.any() else torch.zeros(()) for mask in (negative, ~negative))
        return torch.where(negative, below, above)

    def top_k(x: Tensor) -> Tensor:
        kept = torch.zeros_like(x)
        largest = x.abs().topk(max(1, int(0.01 * len(x)))).indices
        kept[largest] = x[largest]
        return kept

    schemes: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
        "GRACE QSGD, q = 127": (lambda x: qsgd(x, 127), 8),
        "GRACE QSGD, q = 7": (lambda x: qsgd(x, 7), 8),
        "GRACE TernGrad": (terngrad, 8),
        "GRACE 1-bit": (one_bit, 8),
        "GRACE top-k, 1 %": (top_k, 0.01 * (32 + 64)),
    }
    given = torch.cat([values.reshape(-1) for values in gradient.values()]).double()
    for name, (scheme, bits) in schemes.items():
        decoded = torch.cat([scheme(values.reshape(-1)) for values in gradient.values()]).double()
        yield name, bits, float((decoded - given).norm() / given.norm())


REMEMBERING: tuple[tuple[str, dict[str, Any]], ...] = (
    ("eden", {"bits": 1}),
    ("eden", {"bits": 1, "error_feedback": True}),
    ("eden", {"bits": 2}),
    ("eden", {"bits": 2, "error_feedback": True}),
    ("maxmin", {"bits": 2}),
    ("maxmin", {"bits": 2, "error_feedback": True}),
    ("maxmin", {"bits": 4}),
    ("maxmin", {"bits": 4, "error_feedback": True}),
    ("1bit", {}),
    ("terngrad", {}),
    ("topk", {"ratio": 0.01}),
    ("topk", {"ratio": 0.01, "error_feedback": True}),
    ("topk_rmsprop", {"ratio": 0.01, "error_feedback": True}),
    ("dgc", {"ratio": 0.01, "momentum": 0.0}),
    ("svd", {"rank": 4}),
    ("svd", {"rank": 4, "error_feedback": True}),
    ("powersgd", {"rank": 1}),
    ("powersgd", {"rank": 4}),
    ("powersgd", {"rank": 16}),
)


def sums(gradients: Sequence[Mapping[str, Tensor]]) -> Iterator[str]:
    """The lines of the second table."""
    yield "| compressor | options | bits/value | error of the sum |"
    yield "| --- | --- | ---: | ---: |"
    layers = layers_like(gradients[0], 512)
    total = torch.stack([packed(gradient).flat.double() for gradient in gradients]).sum(0)
    for name, options in REMEMBERING:
        averager = compression.build(name, **options).averager(layers, Solo(), seed=0)
        summed = torch.zeros_like(total)
        for step, gradient in enumerate(gradients):
            averaged = packed(gradient)
            averager.average_(averaged, step)
            averager.settle(True)
            summed += averaged.flat
        bits = 8 * averager.encoded_bytes / (len(total) * len(gradients))
        error = float((summed - total).norm() / total.norm())
        yield f"| {name} | {in_words(options)} | {bits:.3f} | {error:.4f} |"


AVERAGED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("eden", {"bits": 1}),
    ("eden", {"bits": 2}),
    ("eden", {"bits": 2, "second_hop_bits": 4}),
    ("eden", {"bits": 3}),
    ("eden", {"bits": 4}),
    ("maxmin", {"bits": 2}),
    ("maxmin", {"bits": 2, "bucket_size": 64}),
    ("maxmin", {"bits": 2, "second_hop_bits": 4}),
    ("maxmin", {"bits": 2, "second_hop_bits": 8}),
    ("maxmin", {"bits": 3}),
    ("maxmin", {"bits": 4}),
    ("maxmin", {"bits": 4, "bucket_size": 64}),
    ("maxmin", {"bits": 4, "second_hop_bits": 8}),
    ("norm_uniform", {"bits": 2}),
    ("norm_uniform", {"bits": 4}),
    ("exponential", {"bits": 3}),
    ("exponential", {"bits": 4}),
    ("terngrad", {}),
    ("topk", {"ratio": 0.05, "error_feedback": True}),
    ("powersgd", {"rank": 4}),
    ("powersgd", {"rank": 16}),
)


def averages(gradients: Sequence[Mapping[str, Tensor]]) -> Iterator[str]:
    """The lines of the third table; one gradient for each rank."""
    heads = [f"{kind}, W = {world}" for kind in ("different", "alike") for world in WORLDS]
    yield f"| compressor | options | bits/value | {' | '.join(heads)} |"
    yield "| --- | --- |" + " ---: |" * (1 + len(heads))

    def average(
        compressor: compression.Compressor, own: Sequence[Mapping[str, Tensor]], ranks: ThreadCollectives
    ) -> Tensor:
        averaged = packed(own[ranks.rank])
        layers = layers_like(own[0], compressor.bucket_size)
        compressor.averager(layers, ranks, seed=0).average_(averaged, step=0)
        return averaged.flat

    for name, options in AVERAGED:
        compressor = compression.build(name, **options)
        cells = []
        for alike in (False, True):
            for world in WORLDS:
                own = [gradients[0 if alike else rank] for rank in range(world)]
                true = torch.stack([packed(gradient).flat for gradient in own]).double().mean(0)
                averaged = run_ranks(world, functools.partial(average, compressor, own))[0]
                cells.append(float((averaged - true).norm() / true.norm()))
        layers = layers_like(gradients[0], compressor.bucket_size)
        sent = compressor.averager(layers, Solo(), 0).sent(layers, 2)
        values = sum(layer.numel for layer in layers)
        bits = 8 * sent.addressed / values  # at 2 ranks, each of which sends half of a gradient in each hop
        yield f"| {name} | {in_words(options)} | {bits:.3f} | {' | '.join(f'{cell:.4f}' for cell in cells)} |"


class RotatedMaxMin(MaxMin):
    """Max-min of buckets that are rotated as EDEN does it: what the rotation brings by itself."""

    keyed = True

    def encode_vectors(self, vectors_MK: Tensor, draws: Draws, contraction: bool) -> Tensor:
        count = vectors_MK.shape[1]
        rotated = Rotations.drawn(draws, count).forward(vectors_MK) / count
        return super().encode_vectors(rotated, draws, contraction)

    def decode_records(self, records_MB: Tensor, count: int, draws: Draws | None) -> Tensor:
        assert draws is not None
        return Rotations.drawn(draws, count).back(super().decode_records(records_MB, count, draws)) / count


def ablation(gradient: Mapping[str, Tensor]) -> Iterator[str]:
    """The lines of the fourth table."""
    yield "| values | bits | maxmin | rotated maxmin | eden |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    real = torch.cat([values.reshape(-1) for values in gradient.values() if values.dim() > 1])
    for name, values in (("normal", NORMAL["normal"].reshape(-1)), ("resnet18", real)):
        rows = values[: len(values) // 512 * 512].view(1, -1)
        for bits in (1, 2, 3, 4):
            cells = []
            for codec in (MaxMin(bits), RotatedMaxMin(bits), Eden(bits)):
                found = decoded(codec, codec.encode(rows, 1), rows.shape[1], 1)
                cells.append(float((found - rows).double().square().sum() / rows.double().square().sum()))
            yield f"| {name} | {bits} | {' | '.join(f'{cell:.4f}' for cell in cells)} |"


def in_words(options: Mapping[str, Any]) -> str:
    """Options as the tables show them."""
    words = [name if value is True else f"{name} {value}" for name, value in options.items()]
    return ", ".join(words).replace("bucket_size -1", "whole layers").replace("_", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="write the page to this file too")
    parser.add_argument("--steps", type=int, default=10, help="training steps before the gradient is taken")
    flags = parser.parse_args()
    gradients = real_gradients(flags.steps + SUMMED)
    at = gradients[flags.steps :]
    text = PAGE.format(
        steps=flags.steps,
        summed=SUMMED,
        table="\n".join(table(at[0])),
        sums="\n".join(sums(at)),
        averages="\n".join(averages(at)),
        ablation="\n".join(ablation(at[0])),
        machine=machine(),
        python=platform.python_version(),
        torch=torch.__version__,
    )
    print(text, end="")
    if flags.output:
        flags.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
