"""Hashed random numbers: uniform, and independent from stream to stream."""

import numpy as np
import pytest
import torch

from compression.randomness import stream_key, stream_keys, uniform

ELEMENTS = torch.arange(1 << 18)


def draw(*where: int) -> torch.Tensor:
    seed, step, layer, hop, rank = where
    low, high = (torch.tensor(int(half)) for half in stream_keys(seed, step, np.array([layer]), hop, rank)[0])
    return uniform(ELEMENTS, low, high)


def test_the_keys_of_many_layers_are_those_of_each_one():
    layers = np.array([0, 1, 160, 2**40])
    keys = stream_keys(3, 2**33, layers, 2, 5).astype(np.uint64)
    assert (keys[:, 0] | keys[:, 1] << np.uint64(32)).tolist() == [
        stream_key(3, 2**33, 2, 5, layer) for layer in layers.tolist()
    ]


def test_numbers_lie_in_the_half_open_unit_interval():
    numbers = draw(0, 0, 0, 0, 0)
    assert 0 <= float(numbers.min()) < 1e-4
    assert 1 - 1e-4 < float(numbers.max()) < 1


def test_numbers_are_uniform():
    counts = torch.histc(draw(7, 1, 2, 1, 3).double(), 256, 0, 1)
    expected = len(ELEMENTS) / 256
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 255 + 5 * (2 * 255) ** 0.5  # 5 sigma


def test_every_part_of_the_name_gives_another_stream_without_correlation():
    names = np.eye(5, dtype=int) + 4
    streams = [draw(4, 4, 4, 4, 4), *(draw(*map(int, name)) for name in names)]
    correlation = torch.corrcoef(torch.stack(streams).double()).fill_diagonal_(0).abs().max()
    assert float(correlation) < 5 / len(ELEMENTS) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 8, 512, 1024, 4096, 8192, 12288, 16384, 20480, 32768, 65536])
def test_elements_are_not_correlated_at_any_distance(lag):
    for rank in range(12):
        numbers = draw(1, 2, 3, 1, rank).double() - 0.5
        products = numbers[:-lag] * numbers[lag:]
        assert abs(float(products.mean())) < 5 * float(products.std()) / len(products) ** 0.5
