"""The pipeline: averages of tensors that no model and no backward ever saw."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from compression import Solo, build
from compression.exchange.pipeline import Pipeline
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.threads import ThreadCollectives, run_ranks

LAYERS = layers_of([("a", (40, 50)), ("b", (30,)), ("c", (25, 40))], 64)
CPU = torch.device("cpu")


def parts(rank: int, kind: torch.dtype = torch.float32, scale: float = 1.0) -> list[Gradients]:
    """What a rank has of the layers, in two buffers, `scale` times too large."""
    generator = torch.Generator().manual_seed(rank)
    last, first = (torch.randn(count, generator=generator) * scale for count in (1000, 2030))
    return [Gradients(last.to(kind), ("c",), (0,), scale), Gradients(first.to(kind), ("a", "b"), (0, 2000), scale)]


def averaged(pipeline: Pipeline, submitted: list[Gradients], step: int = 0) -> Tensor:
    found = [future.wait() for future in [pipeline.submit(part, step) for part in submitted]]
    pipeline.check()
    pipeline.averager.settle(True)
    return torch.cat(found)


@pytest.mark.parametrize("name", ["none", "maxmin", "topk", "powersgd"])
def test_averages_are_those_of_the_averager_step_by_step(name: str) -> None:
    def work(ranks: ThreadCollectives) -> tuple[list[Tensor], list[Tensor]]:
        compressor = build(name, bucket_size=64) if name != "none" else build(name)
        direct, pipeline = compressor.averager(LAYERS, ranks, 7), compressor.averager(LAYERS, ranks, 7)
        expected = []
        for step in range(3):
            own = parts(ranks.rank)
            for part in own:
                direct.average_(part, step)
            direct.settle(True)
            expected.append(torch.cat([part.flat for part in own]))
        through = Pipeline(pipeline, LAYERS, CPU)
        found = [averaged(through, parts(ranks.rank), step) for step in range(3)]
        through.close()
        return expected, found

    for expected, found in run_ranks(3, work):
        assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_compressor_sees_no_loss_scale_and_the_averages_have_it(kind: torch.dtype) -> None:
    pipeline = Pipeline(build("topk", ratio=1.0, bucket_size=64).averager(LAYERS, Solo(), 0), LAYERS, CPU)
    own = parts(0, kind, scale=1024.0)
    expected = torch.cat([part.flat.clone() for part in own])
    assert torch.equal(averaged(pipeline, own), expected)
    assert {name: bool(flag) for name, flag in pipeline.nonfinite.items()} == dict.fromkeys("cab", False)
    pipeline.close()


def test_a_full_gradient_is_averaged_when_its_last_buffer_comes() -> None:
    compressor = build("topk", ratio=0.01, bucket_size=64, big_grad=True)
    averager = compressor.averager(LAYERS, Solo(), 0)
    pipeline = Pipeline(averager, LAYERS, CPU, needs_full_gradient=compressor.needs_full_gradient)
    first, second = parts(0)
    early = pipeline.submit(first, 0)
    assert not early.done()
    pipeline.submit(second, 0).wait()
    assert early.wait() is first.flat
    kept = torch.cat([first.flat, second.flat[:2000]]).count_nonzero()
    assert kept == 30  # of 3,000 compressed values
    pipeline.close()


def test_a_layer_that_is_not_finite_is_named() -> None:
    pipeline = Pipeline(build("none").averager(LAYERS, Solo(), 0), LAYERS, CPU)
    own = parts(0)
    own[1].flat[2005] = torch.nan
    averaged(pipeline, own)
    assert {name for name, flag in pipeline.nonfinite.items() if flag} == {"b"}
    pipeline.clear()
    assert pipeline.nonfinite == {}
    pipeline.close()


def test_what_goes_wrong_on_its_thread_is_raised_by_check_and_keeps_nobody_waiting() -> None:
    class Broken(Solo):
        def sum_(self, values: Tensor) -> None:
            raise OSError("the network is gone")

    pipeline = Pipeline(build("none").averager(LAYERS, Broken(), 0), LAYERS, CPU)
    for part in parts(0):
        assert pipeline.submit(part, 0).wait() is part.flat
    with pytest.raises(OSError, match="the network is gone"):
        pipeline.check()
    pipeline.close()


def test_seconds_and_submissions_are_counted() -> None:
    pipeline = Pipeline(build("maxmin", bucket_size=64).averager(LAYERS, Solo(), 0), LAYERS, CPU)
    averaged(pipeline, parts(0))
    assert pipeline.submitted == 2
    assert pipeline.seconds > 0
    pipeline.close()


@pytest.mark.parametrize("whole", [False, True])
def test_what_an_averager_remembers_goes_with_the_last_who_knows_a_closed_pipeline(whole: bool) -> None:
    """Not when the collector comes by: an advice makes dozens, each with twice a model's memory."""
    averager = build("maxmin", bucket_size=64, error_feedback=True).averager(LAYERS, Solo(), 0)
    pipeline = Pipeline(averager, LAYERS, CPU, needs_full_gradient=whole)
    averaged(pipeline, parts(0))
    held, collects = weakref.ref(averager), gc.isenabled()
    gc.disable()
    try:
        pipeline.close()
        del averager, pipeline
        assert held() is None
    finally:
        if collects:
            gc.enable()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_averages_beyond_a_half_types_limit_are_cut_there_and_stay_finite(kind: torch.dtype) -> None:
    """A rotated bucket of equal values at the limit decodes to some larger ones; what was infinite stays so."""
    layers = layers_of([("a", (16, 64))], 64)
    pipeline = Pipeline(build("eden", bits=1, bucket_size=64).averager(layers, Solo(), 0), layers, CPU)
    most = torch.finfo(kind).max
    found = averaged(pipeline, [Gradients(torch.full((1024,), most, dtype=kind), ("a",), (0,))])
    assert found.isfinite().all()
    assert bool((found.abs() == most).any())
    values = torch.ones(1024, dtype=kind)
    values[3] = torch.inf
    found = averaged(pipeline, [Gradients(values, ("a",), (0,))], 1)
    assert not found[:64].isfinite().any()
    assert found[64:].isfinite().all()
    assert bool(pipeline.nonfinite["a"])
    pipeline.close()
