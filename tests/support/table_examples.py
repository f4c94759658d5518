"""Tables for the tests of the search: small random ones that can be enumerated, and one like ResNet-50's."""

from itertools import product

import numpy as np
from hypothesis import strategies as st

from search import Tables


@st.composite
def small_tables(draw, max_layers=5, max_widths=4, measure="root"):
    """Up to 5 layers and 4 widths, with ties, zeros, and more bits that cost less or lose more.

    Of measure "loss", entries are negative, too.
    """
    layers = draw(st.integers(1, max_layers))
    widths = sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=max_widths)))
    size = layers * len(widths)
    errors = draw(
        st.sampled_from(
            [
                st.integers(0, 4).map(float),
                st.just(0.0) | st.floats(1e-9, 100),
                st.floats(-8, 4).map(lambda exponent: 10.0**exponent),
            ]
        )
    )
    if measure == "loss":
        errors = st.builds(lambda sign, error: sign * error, st.sampled_from([-1, 1]), errors)
    error = draw(st.lists(errors, min_size=size, max_size=size))
    nbytes = draw(st.lists(st.integers(1, draw(st.sampled_from([5, 1000]))), min_size=size, max_size=size))
    return Tables(
        layers=[f"layer{row}" for row in range(layers)],
        widths=widths,
        error=np.reshape(error, (layers, -1)),
        nbytes=np.reshape(nbytes, (layers, -1)),
        dense_bytes=draw(st.integers(0, 50)),
        values=draw(st.integers(1, 1000)),
        numel=draw(st.lists(st.integers(1, 1000), min_size=layers, max_size=layers)),
        measure=measure,
        norm2=draw(st.floats(0.1, 100)),
    )


@st.composite
def some_bounds(draw, tables):
    """Least and largest widths of some of the layers."""
    pinned = draw(st.sets(st.sampled_from(tables.layers)))
    ends = st.tuples(st.sampled_from(tables.widths), st.sampled_from(tables.widths))
    return {name: tuple(sorted(draw(ends))) for name in sorted(pinned)}


def every_assignment(tables):
    """All K^L assignments' total errors and encoded bytes, and the assignments as widths."""
    choices = np.array(list(product(range(len(tables.widths)), repeat=len(tables.layers))))
    rows = np.arange(len(tables.layers))
    error = tables.error[rows, choices].sum(axis=1)
    nbytes = tables.nbytes[rows, choices].sum(axis=1)
    return error, nbytes, np.array(tables.widths)[choices]


def zero_error_tables(error=((1, 0), (2, 0))):
    """Two layers that 8 bits encode without error."""
    return Tables(["a", "b"], [2, 8], error, [[2, 8], [2, 8]], dense_bytes=4, values=20, numel=[8, 8])


def many_layers(count):
    """Layers of ten thousands, in sizes and errors like ResNet-50's."""
    random = np.random.default_rng(0)
    numel = np.exp(random.uniform(np.log(4096), np.log(2359296), size=count)).astype(int) // 512 * 512
    widths = np.arange(2, 9)
    error = np.exp(random.normal(size=count))[:, None] / (2**widths - 1) * random.uniform(0.97, 1.03, size=(count, 7))
    nbytes = numel[:, None] * widths // 8 + 8 * (numel[:, None] // 512)
    return Tables(
        layers=[f"blocks.{row}.weight" for row in range(count)],
        widths=widths,
        error=error,
        nbytes=nbytes,
        dense_bytes=1000,
        values=int(numel.sum()) + 250,
        numel=numel,
    )


def fifty_layers(seed=0):
    """54 layers from 9,408 to 2,359,296 values under max-min in buckets of 512, at 2 to 8 bits."""
    random = np.random.default_rng(seed)
    numel = np.append(9408, np.exp(random.uniform(np.log(4096), np.log(2359296), size=53)).astype(int) // 512 * 512)
    widths = np.arange(2, 9)
    scale = np.exp(random.normal(size=54)) / np.sqrt(numel)
    error = (scale * np.sqrt(numel))[:, None] / (2**widths - 1) * random.uniform(0.97, 1.03, size=(54, 7))
    nbytes = numel[:, None] * widths // 8 + 8 * (-(-numel[:, None] // 512))
    return Tables(
        layers=[f"layer{row}" for row in range(54)],
        widths=widths,
        error=error,
        nbytes=nbytes,
        dense_bytes=212480,
        values=int(numel.sum()) + 53120,
        numel=numel,
    )
