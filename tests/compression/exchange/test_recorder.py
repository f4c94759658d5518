"""What a rank remembers of its gradients: of the layers that it has seen, and alike on all ranks."""

import pytest
import torch

from compression import Recorder, Solo
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.threads import ThreadCollectives, run_ranks

LAYERS = layers_of([("used", (2, 3)), ("unused", (2, 2))], 1)


def recorded(unused: frozenset[str]) -> Recorder:
    recorder = Recorder(LAYERS)
    recorder.record(Gradients(torch.ones(10), ("used", "unused"), (0, 6), unused=unused))
    recorder.settle(True)
    return recorder


def test_a_layer_that_no_rank_uses_is_named_on_all_of_them() -> None:
    def work(ranks: ThreadCollectives) -> str:
        with pytest.raises(ValueError, match="no finite gradient of unused was recorded yet, on no rank") as error:
            recorded(frozenset({"unused"})).averaged(ranks)
        return str(error.value)

    assert len(set(run_ranks(2, work))) == 1


@pytest.mark.parametrize("mean", [False, True])
def test_a_layer_that_one_rank_uses_counts_as_zero_on_the_other(mean: bool) -> None:
    def work(ranks: ThreadCollectives) -> float:
        recorder = Recorder(LAYERS)
        if mean:
            recorder.restart()
        unused = frozenset({"unused"} if ranks.rank else ())
        recorder.record(Gradients(torch.ones(10), ("used", "unused"), (0, 6), unused=unused))
        recorder.settle(True)
        return float(recorder.averaged(ranks)["unused"].mean())

    assert run_ranks(2, work) == [0.5, 0.5]


def test_what_was_not_applied_was_not_seen() -> None:
    recorder = Recorder(LAYERS)
    recorder.record(Gradients(torch.ones(10), ("used", "unused"), (0, 6)))
    recorder.settle(torch.tensor(False))
    with pytest.raises(ValueError, match="no finite gradient of used was recorded yet"):
        recorder.averaged(Solo())
