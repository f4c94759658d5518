"""The advisor: what it measures of a model, and that it leaves everything as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import compression
from compression.advice import speeds
from compression.advice.advisor import ALONE, _Measuring, ranks_per_core
from compression.advice.choices import choices
from compression.advice.echo import Echo
from compression.advice.profile import StepError, together
from compression.advice.speeds import Codecs
from compression.costs import Costs
from compression.layers import layers_of
from compression.network.arrangement import Arrangement
from compression.network.collectives import Solo
from compression.network.hosts import Hosts
from compression.network.threads import run_ranks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


class Step:
    """One forward and backward; fails where `bad`."""

    def __init__(self, model: nn.Module, bad: bool = False) -> None:
        self.model, self.bad, self.calls = model, bad, 0
        self.batch = torch.randn(8, 32)

    def __call__(self) -> None:
        self.calls += 1
        if self.bad:
            raise RuntimeError("out of\nluck")
        self.model(self.batch).square().sum().backward()


def test_an_advice_on_paper_leaves_the_model_as_it_was() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].weight.grad = torch.ones_like(model[0].weight)
    found = compression.advise(model, Step(model), simulate="hosts=2 ranks=2 link=1gbit latency=50us")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None
    assert found.cluster.link_mbit == 1_000
    assert found.measured.values == sum(p.numel() for p in model.parameters())
    travelling = [name for buffer in found.measured.buffers for name in buffer]
    assert sorted(travelling) == sorted(name for name, _ in model.named_parameters())
    assert {each.choice.hierarchical for each in found.choices} == {False, True}
    ready = found.measured.compute.ready
    assert all(0 <= each <= found.measured.compute.backward for each in ready.values())
    assert ready["3.weight"] <= ready["0.weight"]


def test_one_rank_alone_has_nothing_to_be_advised_on() -> None:
    model = network()
    step = Step(model)
    with pytest.raises(ValueError, match=r"^nothing travels: advice needs the number of ranks, or a cluster"):
        compression.advise(model, step)
    assert step.calls == 0
    assert "simulate" in ALONE


def test_a_step_that_fails_is_one_line() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"^a step of this model fails: RuntimeError: out of luck; run it") as raised:
        compression.advise(model, Step(model, bad=True), simulate="hosts=2 link=1gbit")
    assert "\n" not in str(raised.value)


def test_a_step_without_a_backward_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="it left no gradient; a step is one forward and backward"):
        compression.advise(model, lambda: model(torch.randn(8, 32)), simulate="hosts=2 link=1gbit")


def test_a_step_that_fails_on_one_rank_fails_on_all() -> None:
    def rank_main(ranks: compression.Collectives) -> str:
        model = network()
        arrangement = Arrangement(ranks, Hosts.separate(2))
        measuring = _Measuring(model, dict(model.named_parameters()), arrangement, Step(model, ranks.rank == 1), None)
        with pytest.raises(ValueError, match="a step of this model fails") as raised:
            measuring.profile.run(measuring.step, 0.0)
        return str(raised.value)

    first, second = run_ranks(2, rank_main)
    assert first == second


def failing_on_one(work: Callable[[_Measuring, bool], object]) -> list[str]:
    """What two ranks say, of which the second fails in some work."""

    def rank_main(ranks: compression.Collectives) -> str:
        model = network()
        arrangement = Arrangement(ranks, Hosts.separate(2))
        measuring = _Measuring(model, dict(model.named_parameters()), arrangement, Step(model), None)
        with pytest.raises(StepError) as raised:
            work(measuring, ranks.rank == 1)
        return str(raised.value)

    return run_ranks(2, rank_main)


def test_a_step_beside_a_codec_that_fails_on_one_rank_fails_on_all() -> None:
    def work(measuring: _Measuring, bad: bool) -> None:
        compute = measuring.profile.run(measuring.step, 0.0)
        measuring.step.bad = bad
        measuring.profile.contention(measuring.step, lambda: None, compute)

    first, second = failing_on_one(work)
    assert first == second == "a step of this model fails: RuntimeError: out of luck; run it without advice first"


def test_an_update_that_fails_on_one_rank_fails_on_all() -> None:
    def work(measuring: _Measuring, bad: bool) -> None:
        measuring.update = lambda: 1 / (0 if bad else 1)
        measuring._updating()

    first, second = failing_on_one(work)
    assert first == second
    assert first.startswith("the update fails: ZeroDivisionError")


def test_a_codec_that_fails_on_one_rank_fails_on_all() -> None:
    def work(measuring: _Measuring, bad: bool) -> None:
        values = {name: torch.randn(shape).flatten() for name, shape in measuring.shapes.items()}
        codecs = Codecs(values, measuring.shapes, [tuple(measuring.shapes)], measuring.network)
        if bad:
            del values["0.weight"]
        codecs.speeds(choices()[:1], 2)

    first, second = failing_on_one(work)
    assert first == second
    assert first.startswith("compressor none fails: KeyError")


def test_a_gradient_that_is_not_finite_on_one_rank_is_refused_on_all() -> None:
    """Its errors would be, and bfloat16 would be advised by accident."""

    def work(measuring: _Measuring, bad: bool) -> None:
        measuring.step.batch *= float("inf") if bad else 1.0
        measuring.profile.run(measuring.step, 0.0)
        measuring.profile.gradient()

    first, second = failing_on_one(work)
    assert first == second
    assert "its gradient is not finite, first that of 0.weight; lower the loss scale or the learning rate" in first


def test_work_of_all_ranks_has_a_result_of_each() -> None:
    assert run_ranks(2, lambda ranks: together(ranks, "it", lambda: ranks.rank)) == [[0, 1], [0, 1]]


def test_an_advice_leaves_random_numbers_and_gradients_as_they_were() -> None:
    model = network()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = torch.get_rng_state()

    def step() -> None:
        model(torch.randn(8, 32)).square().sum().backward()

    compression.advise(model, step, simulate="hosts=2 link=1gbit", update=lambda: torch.randn(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None


def test_ranks_share_the_cores_that_all_of_a_machine_may_use() -> None:
    """Some ranks may use other cores than others; it is the fullest machine that all wait for."""
    pinned, free = frozenset({0}), frozenset({0, 1})
    assert ranks_per_core([("a", frozenset({0})), ("a", frozenset({1}))]) == 1
    assert ranks_per_core([("a", pinned), ("a", free), ("a", free), ("a", pinned)]) == 2
    assert ranks_per_core([("a", free), ("b", pinned), ("b", pinned), ("b", pinned)]) == 3
    assert ranks_per_core([("a", free)]) == 1


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """A process group of one rank, which DDP needs."""
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(minutes=15))
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_what_no_advice_can_time_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with one_rank(tmp_path):
        model = DistributedDataParallel(network(), static_graph=True)
        step = Step(model)
        with pytest.raises(
            ValueError, match=r"cannot run with static_graph=True; make it without that for the advice$"
        ):
            compression.advise(model, step, simulate="hosts=2 link=1gbit")
        assert step.calls == 0
        step()  # a training goes on


def test_buffers_are_those_of_the_users_ddp_and_none_is_broadcast(tmp_path: Path) -> None:
    """A rank whose step fails before its forward would leave the others in such a broadcast."""
    with one_rank(tmp_path):
        layers = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(12)))
        layers.register_buffer("steps", torch.zeros(1))
        model = DistributedDataParallel(layers, bucket_cap_mb=1)
        assert model.will_sync_module_buffers()
        parameters = dict(model.module.named_parameters())
        arrangement = Arrangement(compression.Solo(), Hosts.single(1))
        batch = torch.randn(4, 256)

        def step() -> None:
            assert not model.will_sync_module_buffers()
            model(batch).sum().backward()

        measuring = _Measuring(model, parameters, arrangement, step, None)
        buffers = measuring._buffers(measuring.profile.run(step, 0.0))
        assert model.will_sync_module_buffers()
    assert [len(buffer) for buffer in buffers] == [4, 4, 4]


def test_buffers_overlap_where_the_ranks_networks_let_them() -> None:
    """A machine alone stands for gloo, whose messages go by tag."""
    costs = Costs(0.0, 0.0, 0.0, 0.0, 0.0, {})

    def found(ranks: compression.Collectives) -> tuple[bool, bool]:
        model = network()
        arrangement = Arrangement(ranks, Hosts.separate(ranks.world_size))
        measuring = _Measuring(model, dict(model.named_parameters()), arrangement, Step(model), None)
        with_them = measuring._with_overlaps(costs)
        return with_them.overlaps, with_them.overlaps_inside

    assert found(compression.Solo()) == (True, True)
    tagged = Echo(4)
    assert found(tagged) == (True, True)
    tagged.matched_by_tag = lambda device: False  # type: ignore[method-assign]
    assert found(tagged) == (False, True)


def test_a_codec_is_timed_on_what_holds_most_of_a_models_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the bias that is left of a buffer whose weight is too large, nor on a buffer of a few values."""
    monkeypatch.setattr(speeds, "MOST_VALUES", 1000)
    assert [speeds._part_of(shape) for shape in [(900, 10), (20, 20), (3, 2000), (5,), ()]] == [
        (100, 10), (20, 20), (1, 2000), (5,), ()
    ]  # fmt: skip
    bias, weight, head = layers_of([("bias", (90,)), ("weight", (100, 10)), ("head", (60, 15))], 0)
    assert speeds._cut([bias, weight]) == [weight]
    assert speeds._cut([bias, head]) == [bias, head]
    assert speeds._telling([[weight], [bias], [head]]) == [[head], [weight]]


def test_a_large_layer_is_timed_on_its_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "MOST_VALUES", 2**12)
    shapes = {"weight": (1024, 64), "bias": (64,)}
    gradient = {name: torch.randn(*shape).flatten() for name, shape in shapes.items()}
    codecs = Codecs(gradient, shapes, [("bias", "weight")], Solo())
    timed = []
    turn = Codecs._turn

    def watched(self: Codecs, pipeline: Any, echo: Echo, buffer: Any, step: int) -> tuple[float, float]:
        timed.append({layer.name: layer.shape for layer in buffer})
        return turn(self, pipeline, echo, buffer, step)

    monkeypatch.setattr(Codecs, "_turn", watched)
    found = codecs.speeds(choices(), 2)
    assert all(each.per_value > 0 for each in found.values())
    assert all(each["weight"] == (64, 64) for each in timed)


def test_an_update_is_timed_and_not_called_without_a_need() -> None:
    model = network()
    seen = []

    def update() -> None:
        seen.append(all(parameter.grad is not None for parameter in model.parameters()))

    compression.advise(model, Step(model), simulate="hosts=2 link=1gbit", update=update)
    assert seen == [True] * len(seen)
    assert seen


def test_every_codec_runs_on_an_echo_of_many_ranks() -> None:
    shapes = {"a": (64, 96), "b": (96, 64), "bias": (64,)}
    gradient = {name: torch.randn(*shape).flatten() for name, shape in shapes.items()}
    codecs = Codecs(gradient, shapes, [("bias", "b"), ("a",)], Solo())
    speeds, errors = codecs.speeds(choices(), 4), codecs.errors(choices())
    assert speeds.keys() == errors.keys()
    assert all(each.per_value > 0 and each.per_byte >= 0 for each in speeds.values())
    assert errors["float32"] == 0
    assert 0 < errors["bfloat16"] < 0.01
    assert errors["maxmin, bits 8"] < errors["maxmin, bits 4"] < errors["maxmin, bits 2"]


def test_an_echo_sends_messages_of_the_right_sizes() -> None:
    echo = Echo(3)
    assert echo.first_sent is None
    message = torch.arange(4, dtype=torch.uint8)
    assert torch.equal(echo.gather(message, [4, 4, 2]), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 0], dtype=torch.uint8))
    assert echo.exchange(torch.ones(5, dtype=torch.uint8), [4, 3, 2]).shape == (2, 4)
    assert echo.first_sent is not None
    echo.restart()
    assert echo.first_sent is None
