"""Local SGD and synchronous training, as the benchmark runs them from a checkout."""

import pytest

from benchmarks.local_sgd import run


@pytest.mark.slow
def test_outer_steps_send_fewer_bytes_than_synchronous_training() -> None:
    synchronous, local = (run(ranks=2, every=every, bits=bits, seed=0, steps=4) for every, bits in ((1, 32), (2, 4)))
    for loss, _ in (synchronous, local):
        assert loss < 5.6  # that of guessing among 256 characters
    assert 0 < local[1] < 0.1 * synchronous[1]
