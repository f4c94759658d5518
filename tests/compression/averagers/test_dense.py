"""The whole gradient, as float32 or as bfloat16."""

import pytest
import torch
from torch import Tensor

from compression import Metered, build
from compression.averagers import Dense, RoundedDense
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.threads import ThreadCollectives, run_ranks
from compression.registry import COMPRESSORS

LAYERS = layers_of([("weight", (40, 25)), ("bias", (40,))], 64)
VALUES = 1040


def gradient(rank: int) -> Tensor:
    return torch.randn(VALUES, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize(("dense_dtype", "nbytes"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_average_is_the_mean_as_the_network_adds_it_up(dense_dtype: str, nbytes: int, world_size: int) -> None:
    compressor = build("none", dense_dtype=dense_dtype)

    def work(ranks: ThreadCollectives) -> tuple[Tensor, float, int]:
        network = Metered(ranks)
        bound, flat = compressor.averager(LAYERS, network, 0), gradient(ranks.rank)
        bound.average_(Gradients(flat, ("weight", "bias"), (0, 1000)), 0)
        return flat, network.traffic.bytes_sent, bound.encoded_bytes

    total = torch.zeros(VALUES, dtype=getattr(torch, dense_dtype))
    for rank in range(world_size):
        total += (gradient(rank) * (1.0 / world_size)).to(total.dtype)
    for average, sent, encoded in run_ranks(world_size, work):
        assert average.dtype == torch.float32
        assert torch.equal(average, total.float())
        assert sent == pytest.approx(2 * (world_size - 1) / world_size * nbytes * VALUES)
        assert encoded == nbytes * VALUES


def test_float32_leaves_the_gradients_alone_and_bfloat16_is_an_encoding() -> None:
    plain, rounded = build("none"), build("none", dense_dtype="bfloat16")
    assert not plain.encodes
    assert rounded.encodes  # so that it also averages in two levels
    assert isinstance(plain.averager(LAYERS, ThreadCollectives(0, [None], None), 0), Dense)
    bound = rounded.averager(LAYERS, ThreadCollectives(0, [None], None), 0)
    assert isinstance(bound, RoundedDense)
    assert not bound.lossless


@pytest.mark.parametrize("name", [name for name, row in COMPRESSORS.items() if "dense_dtype" in row.takes])
def test_other_types_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="dense_dtype is float32 or bfloat16, got 'float16'"):
        build(name, dense_dtype="float16")


@pytest.mark.parametrize("name", ["sanity", "stats"])
def test_there_is_no_choice_where_it_means_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"compressor {name} takes no option 'dense_dtype'"):
        build(name, dense_dtype="bfloat16")
