"""The worked example of ADDING_A_COMPRESSOR.md, as a reader would use it: registered, held to all promises, trained."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compression
import tests.compression.test_registry as promises
from tests.support.threads import ThreadCollectives, run_ranks

DOCUMENT = Path(__file__).parents[2] / "ADDING_A_COMPRESSOR.md"
NAME = "scaled_sign"


@pytest.fixture(autouse=True)
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The class that the document's code block defines, with its row in the registry for the time of a test."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (block,) = re.finditer(r"(?<=```python\n).*?(?=```)", text, re.DOTALL)
    lines_before = text.count("\n", 0, block.start())
    names: dict[str, Any] = {"__name__": __name__}  # dataclasses look up the module that they are in
    exec(compile("\n" * lines_before + block.group(), str(DOCUMENT), "exec"), names)
    monkeypatch.setitem(compression.COMPRESSORS, NAME, names["row"])
    return names


@pytest.mark.parametrize("options", [{}, {"error_feedback": True}, {"warmup_steps": 2}], ids=str)
@pytest.mark.parametrize(
    ("promise", "arguments"),
    [
        (promises.test_ranks_agree_bit_for_bit, (3,)),
        (promises.test_a_resumed_run_goes_on_bit_for_bit, ()),
        (promises.test_a_bad_gradient_reaches_every_rank_and_leaves_no_trace, (float("inf"),)),
        (promises.test_a_bad_gradient_reaches_every_rank_and_leaves_no_trace, (float("nan"),)),
        (promises.test_finite_gradients_give_finite_averages, ("huge",)),
        (promises.test_finite_gradients_give_finite_averages, ("denormal",)),
        (promises.test_layers_may_come_in_any_grouping_from_step_to_step, ()),
        (promises.test_counted_bytes_are_the_messages_bytes, (2,)),
        (promises.test_one_rank_alone_still_encodes, ()),
    ],
)
def test_it_keeps_what_every_compressor_promises(options: dict[str, Any], promise: Any, arguments: Any) -> None:
    promise(NAME, {"bucket_size": 64, **options}, *arguments)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_its_messages_are_as_long_as_promised_and_a_contraction(example: dict[str, Any], count: int) -> None:
    codec = example["ScaledSign"]()
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
    wire = codec.encode(values, seed=0)
    assert wire.dtype == torch.uint8
    assert wire.shape == (3, codec.wire_bytes(count))
    decoded = codec.decode(wire, count)
    assert torch.equal(decoded.sign(), values.sign())
    assert ((values - decoded).norm(dim=1) <= values.norm(dim=1)).all()


def test_it_trains() -> None:
    def train(ranks: ThreadCollectives) -> tuple[float, float, Tensor, float]:
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
        for index, parameter in enumerate(model.parameters()):  # threads share torch's generator
            generator = torch.Generator().manual_seed(index)
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        compressor = compression.build(NAME, error_feedback=True)
        exchange = compression.attach(model, compressor, ranks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        losses = []
        for step in range(150):
            images = torch.randn(32, 20, generator=torch.Generator().manual_seed(2 * step + ranks.rank))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), images[:, :10].argmax(1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ratio = exchange.report().ratio
        exchange.close()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return sum(losses[:10]) / 10, sum(losses[-10:]) / 10, weights, ratio

    (first, last, weights, ratio), (_, _, others, _) = run_ranks(2, train)
    assert last < first / 2
    assert torch.equal(weights, others)
    assert ratio < 0.1
