"""The compressor that the benchmarks add for comparison."""

import torch

from benchmarks.bfloat16 import BFloat16
from compression import COMPRESSORS, Metered
from compression.gradients import Gradients
from tests.support.threads import ThreadCollectives, run_ranks


def test_bfloat16_averages_at_half_the_bytes() -> None:
    def work(ranks: ThreadCollectives) -> tuple[torch.Tensor, float]:
        network = Metered(ranks)
        flat = torch.randn(1000, generator=torch.Generator().manual_seed(ranks.rank))
        BFloat16(network).average_(Gradients(flat, ("weight",), (0,)), 0)
        return flat, network.traffic.bytes_sent

    (first, sent), (second, _) = run_ranks(2, work)
    expected = sum(torch.randn(1000, generator=torch.Generator().manual_seed(rank)) for rank in range(2)) / 2
    assert sent == 2000
    assert torch.equal(first, second)
    assert torch.allclose(first, expected, rtol=2**-7, atol=2**-7)


def test_the_programs_own_list_of_compressors_is_untouched() -> None:
    assert "bfloat16" not in COMPRESSORS
