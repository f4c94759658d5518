"""Searches on attached models: all ranks get the same widths, the bytes that they promise, or the same error."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compression
from compression import Solo, with_bits
from compression.network.threads import ThreadCollectives, run_ranks
from search import FamilyResult, Wish, check_search, options_of, search_exchange, search_families
from search.exchanges import changes_of_loss, option_tables, tables_of

VOCABULARY, WIDTH = 50, 16


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is transposed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Transformer(nn.Module):
    """GPT-2's shape: one block, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(8, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = Conv1D(WIDTH, 3 * WIDTH), Conv1D(WIDTH, WIDTH)
        self.c_fc, self.c_out = Conv1D(WIDTH, 4 * WIDTH), Conv1D(4 * WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight
        for index, parameter in enumerate(self.parameters()):  # ranks in threads share torch's generator
            if parameter.dim() == 2:
                generator = torch.Generator().manual_seed(index)
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        q, k, v = self.c_attn(self.norm(x)).chunk(3, -1)
        x = x + self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        logits: Tensor = self.lm_head(x + self.c_out(nn.functional.gelu(self.c_fc(self.norm(x)))))
        return logits


def loss_of(model: nn.Module, seed: int) -> Tensor:
    tokens = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def step(model: nn.Module, exchange: compression.Attached, seed: int) -> None:
    """A step of training."""
    model.zero_grad()
    loss_of(model, seed).backward()
    exchange.settle(exchange.finish())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]


def trained(
    ranks: compression.Collectives, name: str = "maxmin", **options: Any
) -> tuple[nn.Module, compression.Attached]:
    """A model and its exchange, which has recorded two steps; each rank has examples of its own."""
    model = Transformer()
    exchange = compression.attach(model, name, ranks, record=True, **{"bucket_size": 64} | options)
    for seed in (ranks.rank, 10 + ranks.rank):
        step(model, exchange, seed)
    return model, exchange


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", with_bits())
def test_the_bytes_of_a_search_are_those_that_are_sent(name: str, world_size: int) -> None:
    """Dense layers included; where levels are a table, each rank sends one of each layer."""

    def work(ranks: ThreadCollectives) -> tuple[Any, ...]:
        model, exchange = trained(ranks, name)
        result = search_exchange(exchange, target_bits=4.2 if name != "quantile" else 8.0)
        exchange.report()
        step(model, exchange, 20)
        sent = exchange.report().bytes_sent
        promised = result.tables.encoded_bytes(result.installed) + result.tables.dense_bytes
        exchange.close()
        return result.bits_by_layer(), exchange.widths, promised, sent

    bits, widths, promised, sent = zip(*run_ranks(world_size, work), strict=True)
    assert all(each == bits[0] for each in bits)
    assert all({name: each[name] for name in bits[0]} == bits[0] for each in widths)
    assert sum(sent) == pytest.approx(2 * (world_size - 1) * promised[0], rel=1e-12)


def test_residuals_outlive_a_search() -> None:
    _, exchange = trained(Solo(), error_feedback=True)
    before = exchange.state_dict()["averager"]["residual"]
    result = search_exchange(exchange, target_bits=3.9)
    after = exchange.state_dict()["averager"]["residual"]
    assert all(torch.equal(before[name], kept) and kept.any() for name, kept in after.items())
    assert result.settings["error_feedback"] is True
    exchange.close()


def test_with_error_feedback_the_tables_are_of_the_projection() -> None:
    errors = []
    for feedback in (False, True):
        _, exchange = trained(Solo(), error_feedback=feedback)
        assert exchange.recorder is not None
        ones = {name: torch.ones_like(m) * m for name, m in exchange.recorder.averaged(Solo()).items()}
        errors.append(tables_of(exchange, ones, [1, 2], "square"))
        exchange.close()
    plain, projected = errors
    assert (projected.error < plain.error).all()
    assert (projected.error.sum(0) < projected.norm2).all()  # a projection is a contraction


def test_a_tied_embedding_is_one_layer_and_no_weight_moves() -> None:
    model, exchange = trained(Solo())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = lambda: loss_of(model, 99).item()  # noqa: E731
    result = search_exchange(exchange, target_bits=4.0, by="loss", loss=loss, step_size=0.1)
    assert set(result.tables.layers) == {"wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight",
                                         "c_out.weight"}  # fmt: skip
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    exchange.close()


def test_the_change_of_the_loss_is_that_of_a_coarser_step() -> None:
    """Of a quadratic loss it is half the squared error of the step, whatever its slope: both signs are taken."""
    weights = nn.Linear(64, 64, bias=False)
    exchange = compression.attach(weights, "maxmin", Solo(), record=True, bucket_size=64)
    (weights.weight * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).sum().backward()
    exchange.settle(exchange.finish())
    assert exchange.recorder is not None
    gradients = exchange.recorder.averaged(Solo())

    def loss() -> float:
        at = weights.weight.detach().double()
        return float((at.square() / 2 + 3 * at).sum())

    found = changes_of_loss(exchange, gradients, [1, 2, 4], loss, 0.5, 7, Solo())
    for (name, width), change in found.items():
        lost = exchange.compressor.codec_at(width).encoding_error(gradients[name], 7)
        assert change == pytest.approx(float(lost.double().square().sum()) / 8, rel=1e-3)
    exchange.close()


def test_ranks_share_the_evaluations_of_a_loss_and_agree() -> None:
    def work(ranks: ThreadCollectives) -> tuple[int, Any]:
        model, exchange = trained(ranks)
        calls = []

        def loss() -> float:
            calls.append(0)
            return loss_of(model, 99).item()

        result = search_exchange(exchange, Wish.error(4), by="loss", loss=loss, step_size=0.1)
        exchange.close()
        return len(calls), result.tables.error

    alone, (one, other) = run_ranks(1, work)[0], run_ranks(2, work)
    assert alone[0] == 1 + 2 * 6 * 7  # layers, widths
    assert one[0] == other[0] == 1 + 6 * 7
    assert np.array_equal(one[1], other[1])


def test_a_failure_of_any_rank_is_told_on_all() -> None:
    def work(ranks: ThreadCollectives) -> str:
        model, exchange = trained(ranks)

        def loss() -> float:
            if ranks.rank == 1:
                raise OSError("the examples are gone")
            return loss_of(model, 99).item()

        with pytest.raises(ValueError, match="OSError: the examples are gone"):
            search_exchange(exchange, target_bits=4.0, by="loss", loss=loss)
        exchange.close()
        return ""

    run_ranks(2, work)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_bits": 0.5}, "must hold the cheapest assignment"),
        ({"target_bits": 3.0, "wish": Wish.balance()}, "target_bits is a wish, and a search has one"),
        ({"by": "loss", "target_bits": 3.0}, "need the loss of the model as it is"),
        ({"by": "loss", "loss": lambda: float("nan"), "target_bits": 3.0}, "must be finite, got nan for wte.weight"),
        ({"pins": ["nothing.*=4"]}, "matches no compressed layer; there are wte.weight, wpe.weight"),
        ({"widths": [0, 2]}, "1 to 8 bits wide, got bits=0"),
        ({"popsize": 0}, "popsize of at least 1"),
    ],
)
def test_what_cannot_be_searched_is_refused_on_all_ranks_alike(options: dict[str, Any], words: str) -> None:
    def work(ranks: ThreadCollectives) -> str:
        _, exchange = trained(ranks)
        with pytest.raises(ValueError, match=words) as error:
            search_exchange(exchange, **options)
        assert set(exchange.widths.values()) == {4, compression.DENSE}
        exchange.close()
        return str(error.value)

    assert len(set(run_ranks(2, work))) == 1


def test_a_gradient_that_is_not_finite_is_named_on_all_ranks() -> None:
    def work(ranks: ThreadCollectives) -> None:
        model, exchange = trained(ranks)
        with exchange.no_sync():
            loss_of(model, 0).backward()
        if ranks.rank == 1:
            model.c_fc.weight.grad[0, 0] = float("inf")  # type: ignore[index, union-attr]
        exchange.record()
        with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity in c_fc\.weight"):
            search_exchange(exchange)
        exchange.close()

    run_ranks(2, work)


def test_an_exchange_without_widths_or_records_is_refused() -> None:
    _, exchange = trained(Solo(), "topk")
    with pytest.raises(ValueError, match="compressor topk has no bit widths; those with: maxmin"):
        search_exchange(exchange)
    exchange.close()
    _, exchange = trained(Solo(), second_hop_bits=8)
    with pytest.raises(ValueError, match="second_hop_bits gives those of averages; leave it out"):
        search_exchange(exchange)
    exchange.close()
    exchange = compression.attach(Transformer(), "maxmin", Solo())
    with pytest.raises(ValueError, match="attach with record=True"):
        search_exchange(exchange)
    exchange.close()


# Searches among families

SMALL = {"bucket_size": 64}
COMMON: dict[str, dict[str, Any]] = {
    "maxmin": {**SMALL, "error_feedback": True},
    "eden": {**SMALL, "error_feedback": True},
    "topk": {**SMALL, "error_feedback": True},
    "powersgd": SMALL,
}
OPTIONS = options_of(COMMON, [2, 3, 4, 6, 8], [0.01, 0.05, 0.2], [1, 2, 4])


def of_families(ranks: compression.Collectives) -> tuple[nn.Module, compression.Attached]:
    """Likewise of a model that averages by a mix, which is max-min everywhere at first."""
    model = Transformer()
    start = compression.mixed({}, ("maxmin", COMMON["maxmin"]), whole_layers=True)
    exchange = compression.attach(model, start, ranks, record=True)
    for seed in (ranks.rank, 10 + ranks.rank):
        step(model, exchange, seed)
    return model, exchange


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_what_was_chosen_among_families_is_what_travels(world_size: int) -> None:
    def work(ranks: ThreadCollectives) -> tuple[FamilyResult, float, float, list[Tensor]]:
        model, exchange = of_families(ranks)
        result = search_families(exchange, OPTIONS, Wish.bits(1.5), by="square")
        exchange.report()
        step(model, exchange, 20 + ranks.rank)
        report = exchange.report()
        exchange.close()
        return result, report.bytes_sent, report.ratio, [p.detach().clone() for p in model.parameters()]

    results, sent, ratios, weights = zip(*run_ranks(world_size, work), strict=True)
    result = results[0]
    assert all(each.option_by_layer() == result.option_by_layer() for each in results)
    assert all(torch.equal(mine, theirs) for others in weights for mine, theirs in zip(weights[0], others, strict=True))
    assert len({option.family for option in result.option_by_layer().values()}) > 1
    assert result.tables.bits_a_value(result.found.bits) <= 1.5
    promised = result.tables.encoded_bytes(result.found.bits) + result.tables.dense_bytes
    if world_size > 1:
        rounded_up = len(result.tables.layers) / 2 if world_size % 2 else 1e-6  # half a byte a layer
        assert -1e-6 <= promised - sum(sent) / (2 * (world_size - 1)) <= rounded_up
    else:
        assert 0 < ratios[0] < 0.3


def test_widths_cost_among_families_what_they_cost_alone() -> None:
    def work(ranks: ThreadCollectives) -> None:
        _, exchange = of_families(ranks)
        assert exchange.recorder is not None
        m = exchange.recorder.averaged(ranks)
        tables = option_tables(exchange, m, OPTIONS, "square")
        _, alone = trained(ranks, "maxmin", error_feedback=True)
        widths = [2, 3, 4, 6, 8]
        expected = tables_of(alone, m, widths, "square")
        maxmin = tables.only("maxmin")
        assert np.array_equal(maxmin.nbytes, expected.nbytes)
        assert np.array_equal(maxmin.error, expected.error)
        assert tables.norm2 == expected.norm2
        assert tables.dense_bytes == alone.dense_bytes
        exchange.close()
        alone.close()

    run_ranks(3, work)


def test_among_families_errors_are_those_of_real_encodings() -> None:
    _, exchange = of_families(Solo())
    assert exchange.recorder is not None
    m = exchange.recorder.averaged(Solo())
    tables = option_tables(exchange, m, OPTIONS)
    for row, name in enumerate(tables.layers):
        values = m[name].reshape(-1)
        for column, option in enumerate(tables.options):
            if option.family == "topk":
                kept = compression.codec("topk", ratio=option.setting).kept(len(values))
                lost = values.abs().sort().values[: len(values) - kept]
                assert tables.error[row, column] == pytest.approx(float(lost.norm()), rel=1e-4)
            if option.family == "none":
                assert tables.error[row, column] == 0
    exchange.close()


def test_among_families_an_odd_gradient_is_an_error_of_all_ranks() -> None:
    def work(ranks: ThreadCollectives) -> str:
        model = Transformer()
        exchange = compression.attach(model, compression.mixed({}, ("maxmin", SMALL)), ranks, record=True)
        with pytest.raises(ValueError, match="no gradient was recorded yet"):
            search_families(exchange, OPTIONS, Wish.bits(3.0))
        step(model, exchange, 0)
        assert exchange.recorder is not None
        if ranks.rank == 1:
            exchange.recorder.state.current[5] = float("nan")  # type: ignore[index]
        with pytest.raises(ValueError, match="must be finite, got NaN or infinity in ") as found:
            search_families(exchange, OPTIONS, Wish.bits(3.0))
        exchange.close()
        return str(found.value)

    assert len({*run_ranks(2, work)}) == 1


def test_an_error_that_pins_put_out_of_reach_is_refused_before_any_gradient_is_known() -> None:
    exchange = compression.attach(Transformer(), "maxmin", Solo(), record=True, bucket_size=64)
    check_search(exchange, Wish.error(7), pins=["wte.weight=2"])  # other layers may make up for it
    check_search(exchange, Wish.error(8))
    with pytest.raises(ValueError, match=r"cannot be kept: wte\.weight has at most 2, and no layer more than that"):
        check_search(exchange, Wish.error(8), pins=["wte.weight=2"])
    exchange.close()
