"""Averaging of codes: unbiased, bounded with error feedback, as many bytes as promised."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from compression import DENSE, Collectives, Metered, Solo, averagers, build, codec, with_bits
from compression.averagers import Averager, TwoHop
from compression.codecs.base import BFloat16
from compression.exchange.engine import Engine
from compression.gradients import Gradients
from compression.layers import layers_of, shard
from compression.network.collectives import PostedExchange, PostedGather
from compression.network.threads import Counting, ThreadCollectives, run_ranks
from compression.plans import PlanCache

LAYERS = layers_of([("weight", (40, 50)), ("bias", (40,))], 64)
VALUES = 2040
GRADIENTS = torch.randn(4, VALUES, generator=torch.Generator().manual_seed(0))


def two_hop(
    ranks: Collectives, bits: int, feedback: bool = False, seed: int = 0, of_averages: int | None = None
) -> TwoHop:
    quantizer = codec("maxmin", bits=bits, bucket_size=64)
    return TwoHop(quantizer, LAYERS, ranks, seed, feedback, second_hop_bits=of_averages)


def average(bound: Averager, values: torch.Tensor, step: int) -> torch.Tensor:
    flat = values.clone()
    bound.average_(Gradients(flat, ("weight", "bias"), (0, 2000)), step)
    return flat


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_average_is_unbiased(bits: int) -> None:
    steps = 400

    def work(ranks: ThreadCollectives) -> torch.Tensor:
        bound = two_hop(ranks, bits)
        return torch.stack([average(bound, GRADIENTS[ranks.rank], step) for step in range(steps)])

    averages = run_ranks(2, work)[0]
    error = (averages.mean(0) - GRADIENTS[:2].mean(0))[:2000]
    variance = averages[:, :2000].var(0) / steps
    # The mean square over 2,000 values is the mean variance, with a deviation of about 0.03 of it; 5 sigma.
    assert float((error**2).mean() / variance.mean()) < 1.16


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_average_of_clipped_values_is_clipped_no_further(world_size: int) -> None:
    """TernGrad is unbiased for what one clipping leaves of what travels; an owner adds its own values as they are."""
    steps, quantizer = 400, codec("terngrad", bucket_size=64)
    heavy = GRADIENTS**3
    buckets = heavy[:world_size, :1984].reshape(-1, 64)  # whole ones of the layer
    largest = quantizer.fit(buckets)
    added = buckets.clamp(-largest, largest).reshape(world_size, -1)
    if world_size > 1:
        for rank, (start, stop) in enumerate(shard(2000, 64, world_size, 0)):
            added[rank, start:stop] = heavy[rank, start : min(stop, 1984)]
    expected = added.mean(0)
    assert not torch.equal(expected, heavy[:world_size, :1984].mean(0))

    def work(ranks: ThreadCollectives) -> torch.Tensor:
        bound = TwoHop(quantizer, LAYERS, ranks, 0)
        return torch.stack([average(bound, heavy[ranks.rank], step)[:1984] for step in range(steps)])

    averages = run_ranks(world_size, work)[0].double()
    error = averages.mean(0) - expected
    noise = averages.std(0) / steps**0.5
    assert float(error.abs().sum()) < 1.2 * float(noise.sum())  # 0.8 of it is expected
    assert abs(float((error * expected).sum())) < 5 * float((noise * expected).norm())


def test_layers_that_are_not_compressed_travel_exactly() -> None:
    averages = run_ranks(4, lambda ranks: average(two_hop(ranks, 2), GRADIENTS[ranks.rank], 0))
    expected = sum(0.25 * GRADIENTS[rank, 2000:] for rank in range(4))
    assert torch.equal(averages[0][2000:], expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_in_bfloat16_they_are_added_up_in_float32(world_size: int) -> None:
    """What an owner has of its own shard is not rounded before the sum; one rank alone sends itself everything."""

    def work(ranks: ThreadCollectives) -> torch.Tensor:
        bound = TwoHop(codec("maxmin", bits=2, bucket_size=64), LAYERS, ranks, 0, dense=BFloat16())
        owners = [rank for rank, (start, stop) in enumerate(bound.shards["bias"]) if stop > start]
        assert len(owners) == 1  # it is one bucket
        return torch.cat([average(bound, GRADIENTS[ranks.rank], 0)[2000:], torch.tensor(owners)])

    *_, first = averages = run_ranks(world_size, work)
    assert all(torch.equal(first, other) for other in averages)
    total, owner = torch.zeros(40), int(first[-1])
    for rank in range(world_size):
        own = GRADIENTS[rank, 2000:]
        total += (own if rank == owner and world_size > 1 else own.bfloat16().float()) * (1.0 / world_size)
    assert torch.equal(first[:-1], total.bfloat16().float())


def test_in_bfloat16_every_layer_without_codes_takes_half_the_bytes_and_is_told_as_before() -> None:
    bound = TwoHop(codec("maxmin", bits=4, bucket_size=64), LAYERS, Solo(), 0, True, BFloat16())
    sizes = []
    for widths in ({}, {"weight": DENSE}):
        bound.set_widths(widths)
        before = bound.encoded_bytes
        average(bound, GRADIENTS[0], 0)
        sizes.append(bound.encoded_bytes - before)
    assert sizes == [80 + codec("maxmin", bits=4, bucket_size=64).wire_bytes(2000), 80 + 4000]
    assert bound.widths == {"weight": DENSE, "bias": DENSE}
    with pytest.raises(ValueError, match="bits=16"):
        bound.set_widths({"weight": 16})


def test_residuals_account_for_every_loss() -> None:
    """mean of (gradients + residuals) = average + residuals now, up to rounding."""

    def work(ranks: ThreadCollectives) -> tuple[torch.Tensor, torch.Tensor]:
        bound = two_hop(ranks, 2, feedback=True)
        applied = torch.zeros(VALUES)
        for step in range(5):
            applied += average(bound, GRADIENTS[ranks.rank], step)
            bound.settle(True)
        state = bound.state_dict()
        residual = torch.zeros(VALUES)
        residual[:2000] = state["residual"]["weight"] / ranks.world_size
        start, stop = bound.shards["weight"][ranks.rank]
        residual[start:stop] += state["share_residual"]["weight"]
        ranks.sum_(residual)
        return applied, residual

    applied, residual = run_ranks(3, work)[0]
    assert torch.allclose(applied + residual, 5 * GRADIENTS[:3].mean(0), atol=1e-4)


def test_widths_are_per_layer_and_change_what_is_sent() -> None:
    """One rank alone encodes everything, two ranks one half each."""

    def work(ranks: Collectives) -> tuple[int, ...]:
        bound = two_hop(ranks, 4)
        sizes = []
        for widths in ({}, {"weight": 2}, {"weight": DENSE}):
            bound.set_widths(widths)
            before = bound.encoded_bytes
            average(bound, GRADIENTS[ranks.rank], 0)
            sizes.append(bound.encoded_bytes - before)
        return tuple(sizes)

    expected = tuple(
        160 + (8000 if bits == DENSE else codec("maxmin", bits=bits, bucket_size=64).wire_bytes(2000))
        for bits in (4, 2, DENSE)
    )
    assert work(Solo()) == expected
    assert [sum(sizes) for sizes in zip(*run_ranks(2, work), strict=True)] == [*expected]


def test_widths_that_do_not_fit_are_refused() -> None:
    bound = two_hop(Solo(), 4)
    with pytest.raises(ValueError, match="bias is not a compressed layer of this model"):
        bound.set_widths({"bias": 4})
    with pytest.raises(ValueError, match="1 to 8 bits wide, got bits=9"):
        bound.set_widths({"weight": 9})


def test_residuals_of_another_model_are_refused() -> None:
    bound = two_hop(Solo(), 4, feedback=True)
    with pytest.raises(ValueError, match="do not fit the layers: weight has 7 values there and 2000 here"):
        bound.load_state_dict({"residual": {"weight": torch.zeros(7)}, "share_residual": {}})


@pytest.mark.parametrize("whole_steps", [True, False], ids=["of all layers", "of each"])
def test_residuals_outlive_the_time_in_which_a_layer_travels_dense(whole_steps: bool) -> None:
    """Also where the last step in which it did not was skipped, since its gradients were not finite."""
    layers = layers_of([("a", (40, 25)), ("b", (25, 40))], 64)
    bound = TwoHop(codec("maxmin", bits=4, bucket_size=64), layers, Solo(), 0, error_feedback=True)

    def residuals_after(step: int, applied: bool = True, factor: float = 1.0) -> list[torch.Tensor]:
        flat = GRADIENTS[step % 4, :2000] * factor
        bound.average_(Gradients(flat, ("a", "b"), (0, 1000)), step)
        if whole_steps:
            bound.settle(applied)
        else:
            for name in "ab":
                bound.settle(torch.tensor(applied), [name])
        assert bool(flat.isfinite().all()) == applied
        return [torch.stack([each[name] for each in bound.state_dict().values()]) for name in "ab"]

    before, _ = residuals_after(0)
    residuals_after(1, applied=False, factor=float("nan"))
    bound.set_widths({"a": DENSE})
    _, last_of_b = residuals_after(2)
    for step in (3, 4):
        of_a, of_b = residuals_after(step)
        assert torch.equal(of_a, before)
        assert not torch.equal(of_b, last_of_b)
        last_of_b = of_b
    bound.set_widths({"a": 4})
    of_a, _ = residuals_after(5)
    assert of_a.isfinite().all()
    assert not torch.equal(of_a, before)


def test_warm_up_steps_are_float32_and_then_compressed() -> None:
    def work(ranks: ThreadCollectives) -> list[bool]:
        bound = build("maxmin", bits=2, bucket_size=64, warmup_steps=2).averager(LAYERS, ranks, 0)
        exact = (GRADIENTS[0] * 0.5) + (GRADIENTS[1] * 0.5)
        return [torch.equal(average(bound, GRADIENTS[ranks.rank], step), exact) for step in range(4)]

    assert run_ranks(2, work) == [[True, True, False, False]] * 2


def test_warm_up_steps_in_bfloat16_take_half_the_bytes() -> None:
    def work(ranks: ThreadCollectives) -> list[float]:
        network = Metered(ranks)
        options = {"bits": 2, "bucket_size": 64, "warmup_steps": 2, "dense_dtype": "bfloat16"}
        bound = build("maxmin", **options).averager(LAYERS, network, 0)
        for step in range(2):
            average(bound, GRADIENTS[ranks.rank], step)
        return [network.traffic.bytes_sent, bound.encoded_bytes]

    assert run_ranks(2, work) == [[2 * 2 * VALUES, 2 * 2 * VALUES]] * 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("of_averages", [None, 5])
def test_averages_and_residuals_do_not_depend_on_the_chunks(
    world_size: int, of_averages: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(ranks: ThreadCollectives) -> list[torch.Tensor]:
        bound = two_hop(ranks, bits=3, feedback=True, of_averages=of_averages)
        found = []
        for step in range(3):
            found.append(average(bound, GRADIENTS[ranks.rank], step))
            bound.settle(True)
        return [*found, *(value for state in bound.state_dict().values() for value in state.values())]

    whole = run_ranks(world_size, work)
    monkeypatch.setattr(averagers.two_hop, "CHUNK_BYTES", 100)
    shard = run_ranks(world_size, work)
    for ours, theirs in zip(whole, shard, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_all_chunks_are_posted_and_one_is_encoded_while_another_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averagers.two_hop, "CHUNK_BYTES", 500)
    told: list[str] = []

    @dataclass
    class NotedExchange:
        network: "Noted"
        tag: int
        inner: PostedExchange

        def send(self, messages: torch.Tensor) -> None:
            self.network.note(f"exchange {self.tag}")
            self.inner.send(messages)

        def wait(self) -> torch.Tensor:
            self.network.note(f"exchanged {self.tag}")
            return self.inner.wait()

    @dataclass
    class NotedGather:
        network: "Noted"
        tag: int
        inner: PostedGather

        def send(self) -> None:
            self.network.note(f"gather {self.tag}")
            self.inner.send()

        def wait(self) -> torch.Tensor:
            self.network.note(f"gathered {self.tag}")
            return self.inner.wait()

    class Noted(ThreadCollectives):
        """Notes what rank 0 posts, sends and waits for."""

        def post_exchange(self, sizes: Sequence[int], tag: int, device: torch.device) -> PostedExchange:
            self.note(f"post {tag}")
            return NotedExchange(self, tag, super().post_exchange(sizes, tag, device))

        def post_gather(self, messages: torch.Tensor, sizes: Sequence[int], tag: int) -> PostedGather:
            return NotedGather(self, tag, super().post_gather(messages, sizes, tag))

        def note(self, words: str) -> None:
            if self.rank == 0:
                told.append(words)

    def work(ranks: ThreadCollectives) -> None:
        average(two_hop(Noted.of(ranks), bits=4), GRADIENTS[ranks.rank], 0)

    run_ranks(2, work)
    assert told == [
        "post 0", "post 1", "exchange 0", "exchange 1",
        "exchanged 0", "gather 0", "exchanged 1", "gather 1", "gathered 0", "gathered 1",
    ]  # fmt: skip


def test_what_a_rank_keeps_is_not_encoded() -> None:
    """Zeros on the other rank, which max-min sends exactly: only the second hop errs."""

    def work(ranks: ThreadCollectives) -> torch.Tensor:
        bound = two_hop(ranks, bits=2, feedback=True)
        average(bound, GRADIENTS[0] * (ranks.rank == 0), 0)
        bound.settle(True)
        start, stop = bound.shards["weight"][ranks.rank]
        residual: torch.Tensor = bound.state_dict()["residual"]["weight"]
        return torch.stack([residual[start:stop].abs().sum(), residual.abs().sum()])

    (kept, all_of_rank_0), (_, all_of_rank_1) = run_ranks(2, work)
    assert kept == 0
    assert all_of_rank_0 > 0
    assert all_of_rank_1 == 0


def test_only_what_ends_with_the_first_layer_travels_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averagers.two_hop, "CHUNK_BYTES", 100)
    bound = two_hop(Solo(), bits=4)
    chunks = [
        len(bound._planned(Gradients(GRADIENTS[0], names, offsets)).chunks)
        for names, offsets in [(("bias", "weight"), (0, 40)), (("weight",), (0,)), (("bias",), (0,))]
    ]
    weight, bias = 2000 // 2 + 8 * 32, 4 * 40  # bytes
    assert chunks == [(weight + bias) // 100, weight // 100, 1]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_messages_of_all_chunks_are_promised(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are cut nowhere, so that some messages of some chunks are empty; chunks do not wait for one another."""
    monkeypatch.setattr(averagers.two_hop, "CHUNK_BYTES", 70)

    def work(ranks: ThreadCollectives) -> int:
        network = Counting.of(ranks)
        average(two_hop(network, bits=4), GRADIENTS[0], 0)
        return network.messages

    promised = two_hop(Solo(), bits=4).sent(LAYERS, world_size)
    assert sum(run_ranks(world_size, work)) / world_size == pytest.approx(promised.messages)
    assert promised.messages > 10 * (world_size - 1)
    assert promised.rounds == 2


def test_with_many_ranks_there_are_fewer_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message costs time however short it is."""
    layers = layers_of([("weight", (100, 1024))], 64)
    monkeypatch.setattr(averagers.two_hop, "CHUNK_BYTES", 8000)
    bound = TwoHop(codec("maxmin", bits=4, bucket_size=64), layers, Solo(), 0)
    chunks = {ranks: bound.sent(layers, ranks).messages / (2 * (ranks - 1)) for ranks in (2, 24, 48, 480)}
    assert chunks == {2: 8, 24: 8, 48: 4, 480: 1}


@pytest.mark.parametrize("feedback", [False, True])
def test_averages_may_be_under_way_at_one_time(feedback: bool) -> None:
    def work(ranks: ThreadCollectives) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for together in (False, True):
            bound, flats = two_hop(ranks, 4, feedback), GRADIENTS[ranks.rank].clone().split([2000, 40])
            parts = [Gradients(flat, (name,), (0,)) for flat, name in zip(flats, ("weight", "bias"), strict=True)]
            engine = Engine(torch.device("cpu"), bool)
            for part in parts:
                engine.submit(partial(bound.post(part, 0), part) if together else partial(bound.average_, part, 0))
            engine.close()
            found.append(torch.cat(flats))
        return found[0], found[1]

    for one_by_one, together in run_ranks(3, work):
        assert torch.equal(one_by_one, together)


def test_plans_of_ever_other_layers_are_not_kept_for_ever() -> None:
    layers = layers_of([(f"layer{k}", (8, 8)) for k in range(8)], 64)
    averager = build("maxmin", bucket_size=64).averager(layers, Solo(), 0)
    assert isinstance(averager, TwoHop)
    for chosen in range(1, 256):
        names = tuple(layer.name for k, layer in enumerate(layers) if chosen >> k & 1)
        offsets = tuple(64 * k for k in range(len(names)))
        averager.average_(Gradients(torch.randn(64 * len(names)), names, offsets), 0)
    assert len(averager._groups) <= PlanCache.LIMIT


@pytest.mark.parametrize("of_averages", [2, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_averages_in_other_bits_are_unbiased_alike_and_as_long_as_promised(world_size: int, of_averages: int) -> None:
    steps, bits = 200, 3

    def work(ranks: ThreadCollectives) -> tuple[torch.Tensor, float, float]:
        network = Metered(ranks)
        bound = two_hop(network, bits, of_averages=of_averages)
        averaged = [average(bound, GRADIENTS[ranks.rank], step) for step in range(steps)]
        return torch.stack(averaged), network.traffic.bytes_sent / steps, bound.sent(LAYERS, world_size).addressed

    results = run_ranks(world_size, work)
    first = results[0][0]
    assert all(torch.equal(first, averages) for averages, _, _ in results)
    assert sum(sent for _, sent, _ in results) == pytest.approx(sum(promised for _, _, promised in results))
    error = (first.mean(0) - GRADIENTS[:world_size].mean(0))[:2000]
    assert float((error**2).mean() / (first[:, :2000].var(0) / steps).mean()) < 1.16


def test_averages_in_as_many_bits_are_those_of_one_width() -> None:
    """But for the order in which an owner adds up: its own values go first."""

    def work(ranks: ThreadCollectives) -> list[torch.Tensor]:
        return [average(two_hop(ranks, 3, of_averages=also), GRADIENTS[ranks.rank], 0) for also in (None, 3)]

    (usual, same), _ = run_ranks(2, work)
    assert torch.allclose(usual, same, atol=1e-6)


def test_more_bits_in_hop_two_leave_the_error_of_hop_one_which_averages_out() -> None:
    """Alike gradients of 8 ranks: hop one's error falls by 8, hop two's does not."""

    def squared_error(of_averages: int | None) -> float:
        def work(ranks: ThreadCollectives) -> torch.Tensor:
            bound = two_hop(ranks, 2, of_averages=of_averages)
            return torch.stack([average(bound, GRADIENTS[0], step) for step in range(20)])

        return float(((run_ranks(8, work)[0] - GRADIENTS[0]) ** 2).sum())

    assert squared_error(8) < 0.2 * squared_error(None)


def test_the_width_of_averages_is_one_that_the_codec_has() -> None:
    with pytest.raises(ValueError, match="Exponential codes are 2 to 8 bits wide, got bits=1"):
        build("exponential", second_hop_bits=1)
    with pytest.raises(ValueError, match="compressor 1bit takes no option 'second_hop_bits'"):
        build("1bit", second_hop_bits=4)


@pytest.mark.parametrize("dense_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", with_bits())
def test_bytes_at_a_width_are_those_that_are_encoded(name: str, world_size: int, dense_dtype: str) -> None:
    """Of all layers and shards: where levels are a table, each shard has its own. Warm-up changes nothing of that."""
    compressor = build(name, bucket_size=64, dense_dtype=dense_dtype, warmup_steps=1)
    compressed, dense = LAYERS

    def work(ranks: ThreadCollectives) -> tuple[int, float, float]:
        network = Metered(ranks)
        bound = compressor.averager(LAYERS, network, 0)
        bound.set_widths({"weight": 3})
        average(bound, GRADIENTS[ranks.rank], 1)
        at_three = bound.encoded_bytes_at([compressed], 3, world_size) + bound.encoded_bytes_at([dense], 32, world_size)
        return sum(at_three), network.traffic.bytes_sent, bound.encoded_bytes

    promised, sent, encoded = zip(*run_ranks(world_size, work), strict=True)
    assert sum(sent) == 2 * (world_size - 1) * promised[0]
    assert world_size > 1 or encoded[0] == promised[0]


def test_bytes_at_a_width_need_widths() -> None:
    with pytest.raises(ValueError, match="no bit widths to measure"):
        build("topk").averager(LAYERS, Solo(), 0).encoded_bytes_at(LAYERS, 4, 1)
    with pytest.raises(ValueError, match="1 to 8 bits wide, got bits=9"):
        build("maxmin", bucket_size=64).averager(LAYERS, Solo(), 0).encoded_bytes_at(LAYERS, 9, 1)
