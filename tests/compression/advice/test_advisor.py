"""The advisor: what it measures of a model, and that it leaves everything as it was."""

import pytest
import torch
from torch import nn

import compression
from compression.advice.advisor import ALONE, _Measuring
from compression.advice.echo import Echo
from compression.advice.speeds import Codecs
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


def test_an_update_is_timed_and_not_called_without_a_need() -> None:
    model = network()
    seen = []

    def update() -> None:
        seen.append(all(parameter.grad is not None for parameter in model.parameters()))

    compression.advise(model, Step(model), simulate="hosts=2 link=1gbit", update=update)
    assert seen == [True] * len(seen)
    assert seen


def test_every_codec_runs_on_an_echo_of_many_ranks() -> None:
    from compression.advice.choices import choices

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
