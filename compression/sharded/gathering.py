"""All-gathers of parameters in codes: every rank encodes its row of a unit, and all compute with the decoded rows.

The owner of a row computes with its decoded values, too, so that parameters are equal on all ranks, bit for bit. What
it keeps, and what the optimizer updates, is exact: no error adds up. Codes are the nearest (`codecs.nearest`), so that
forward, its recomputation and backward see the same values. So do evaluation and `module.unshard()`; `state_dict()`
has the owners' exact ones.

W ranks, S values of a unit's row, B bytes of its message.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ..codecs.nearest import Nearest
from ..layers import BFLOAT16, DENSE, Layer, compressible
from ..network.arrangement import Arrangement
from ..network.collectives import Collectives, Metered, PostedGather, Solo, Traffic, part_of
from ..network.process_groups import ProcessGroups
from ..network.torch_distributed import TorchDistributed
from ..network.verified import Verified
from ..plans import Plan, Segment, plan
from ..randomness import stream_keys
from .units import Unit

BITS = range(4, 9)
BLOCK = 512  # values that share a minimum and a step

_DENSE_BITS = {torch.float32: DENSE, torch.float16: DENSE, torch.bfloat16: BFLOAT16}


def check_bits(bits: int) -> None:
    """Raise ValueError for a width that codes of parameters do not have."""
    if not isinstance(bits, int) or bits not in BITS:
        raise ValueError(
            f"gather_bits are those of a parameter's code in all-gathers, {BITS[0]} to {BITS[-1]}, got {bits}; leave "
            "it out to gather parameters as they are"
        )


class Gathering:
    """The all-gathers of a model's units, in codes of some bits until it is closed.

    Where gradients travel in two levels, rows do: each crosses the link to a host once, to the rank of the same place,
    which hands it on inside.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        bits: int,
        ranks: TorchDistributed,
        device: torch.device,
        arrangement: Arrangement,
    ) -> None:
        """`ranks`: those that share the units, which average as in `arrangement`. All of them call it."""
        check_bits(bits)
        self.traffic = Traffic()
        """What this rank has sent."""
        self.members, self.hosts = dist.get_process_group_ranks(ranks.group), arrangement.hosts
        self._units, self._verify_wire, self._taken = units, arrangement.verify_wire, (0.0, 0.0)
        self._made = ProcessGroups(ranks, self.members, device)
        inside: Collectives = Solo()
        places = [list(range(ranks.world_size))]
        if arrangement.levels is not None:
            inside, places = self._network(ranks, self.hosts.inside), self.hosts.between
        self.rows = Rows(inside, self._network(ranks, places), tuple(rank for place in places for rank in place))
        self.under_way = 0
        """Gathers that began and did not end, as where one raised: their messages may still be on their way."""
        self._before = [unit.group._all_gather_comm for unit in units]
        for tag, unit in enumerate(units):
            comm: Any = AllGather(self, unit, Nearest(bits, BLOCK), tag)  # FSDP's base of these is private
            unit.module.set_custom_all_gather(comm)

    def take_bytes(self) -> tuple[float, float]:
        """Bytes since the last call: those that this rank has sent, and those that its host has put on its link."""
        sent, between = self._taken
        self._taken = self.traffic.bytes_sent, self.traffic.bytes_between_hosts
        ranks_per_host = len(self.hosts.of) / self.hosts.count
        return self._taken[0] - sent, ranks_per_host * (self._taken[1] - between)

    def close(self, sound: bool = True) -> None:
        """Let the units' parameters travel as they are. Calling it twice is harmless."""
        units, self._units = self._units, ()
        for unit, comm in zip(units, self._before, strict=False):  # none is left at the second time
            unit.module.set_custom_all_gather(comm)
        self._made.close(sound and not self.under_way)

    def metered(self, network: Collectives, ranks: Sequence[int]) -> Metered:
        """A network of some of the ranks, whose bytes are counted."""
        return Metered(network, self.traffic, [self.hosts.of[rank] for rank in ranks])

    def _network(self, ranks: Collectives, parts: Sequence[Sequence[int]]) -> Collectives:
        own = next(part for part in parts if ranks.rank in part)
        network = self.metered(self._made.network(parts), own)
        return Verified(network, own) if self._verify_wire else network


@dataclass(frozen=True)
class Rows:
    """Gathers of messages of one length, first between the ranks of a place, then inside a host.

    `order` has the ranks in the order in which their messages lie then. Flat, there is one rank inside.
    """

    inside: Collectives
    between: Collectives
    order: tuple[int, ...]

    def empty(self, nbytes: int, device: torch.device) -> Tensor:
        """Memory for all messages of so many bytes: uint8 [W B]."""
        return torch.empty(len(self.order) * nbytes, dtype=torch.uint8, device=device)

    def own(self, messages: Tensor) -> Tensor:
        """This rank's own message among all: uint8 [B], in place."""
        place = self._of_place(messages)
        return part_of(place, self._sizes(place, self.between), self.between.rank)

    def post(self, messages: Tensor, tag: int) -> "_PostedRows":
        """Send this rank's own message, which is in its place. Gathers under way at one time have tags of their own."""
        place = self._of_place(messages)
        posted = self.between.post_gather(place, self._sizes(place, self.between), tag)
        posted.send()
        return _PostedRows(self, messages, tag, posted)

    def hand_out(self, messages: Tensor, of_place: Tensor, tag: int) -> Tensor:
        """All messages, once those of this rank's place have arrived."""
        place = self._of_place(messages)
        if place.data_ptr() != of_place.data_ptr():
            place.copy_(of_place)
        posted = self.inside.post_gather(messages, self._sizes(messages, self.inside), tag)
        posted.send()
        return posted.wait()

    def _of_place(self, messages: Tensor) -> Tensor:
        return part_of(messages, self._sizes(messages, self.inside), self.inside.rank)

    def _sizes(self, messages: Tensor, network: Collectives) -> list[int]:
        return [len(messages) // network.world_size] * network.world_size


@dataclass
class _PostedRows:
    rows: Rows
    messages: Tensor
    tag: int
    posted: PostedGather

    def wait(self) -> Tensor:
        """All messages in order, uint8 [W B]; called once."""
        return self.rows.hand_out(self.messages, self.posted.wait(), self.tag)


@dataclass(frozen=True)
class _Layout:
    """The plans of one row, and of the rows of all ranks from their messages in the order in which these arrive."""

    row: Plan
    rows: Plan
    keys: NDArray[Any]

    @classmethod
    def of(cls, unit: Unit, quantizer: Nearest, dtype: torch.dtype, order: Sequence[int]) -> "_Layout":
        """Padding is encoded like values, so that all ranks' messages are equally long."""
        segments, bits, at = [], {}, 0
        for index, piece in enumerate(unit.pieces):
            coded = compressible(piece.shapes[0], quantizer.bucket_size)
            segments.append(Segment(Layer(index, piece.name, (piece.padded,), coded), at, at))
            bits[piece.name] = quantizer.bits if coded else _DENSE_BITS[dtype]
            at += piece.padded
        shards = {piece.name: [(0, piece.padded)] for piece in unit.pieces}
        row = plan(segments, [0], shards, bits, quantizer.bucket_size, quantizer.record_bytes)
        keys = stream_keys(0, 0, row.layers, 0, 0)  # which nothing is drawn from
        return cls(row, _repeated(row, np.array(order) * at), keys)


class AllGather:
    """What FSDP calls in place of its own all-gather, of one unit (`FSDPModule.set_custom_all_gather`)."""

    def __init__(self, gathering: Gathering, unit: Unit, quantizer: Nearest, tag: int) -> None:
        self._gathering, self._unit, self._quantizer, self._tag = gathering, unit, quantizer, tag
        self._layouts: dict[torch.dtype, _Layout] = {}

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the rows of all ranks."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Fill `output_tensor`, [W S], with the rows of all ranks, each decoded; `input_tensor`, [S], is in its place.

        With `async_op` that is done when the returned work has been waited for. Raises ValueError for parameters of
        several dtypes, which come as bytes, and RuntimeError for others than the unit's.
        """
        self._gathering.under_way += 1
        # After a forward, FSDP may shard what has been decoded over a smaller group; as it is, backward sees the same.
        if group.size() != len(self._gathering.rows.order):
            work = _Arriving(self._gathering, self._post_whole(output_tensor, group))
        else:
            work = self._post_coded(output_tensor, input_tensor)
        if async_op:
            return work
        work.wait()
        return None

    def _post_whole(self, output: Tensor, group: dist.ProcessGroup) -> PostedGather:
        gathering = self._gathering
        members = [gathering.members.index(rank) for rank in dist.get_process_group_ranks(group)]
        network = gathering.metered(TorchDistributed(group), members)
        sizes = [output.nbytes // network.world_size] * network.world_size
        posted = network.post_gather(output.view(torch.uint8), sizes, self._tag)
        posted.send()
        return posted

    def _post_coded(self, output: Tensor, values: Tensor) -> "_Arriving":
        layout, rows = self._layout(values), self._gathering.rows
        messages = rows.empty(layout.row.wire_bytes, values.device)
        self._quantizer.encode_plan(layout.row, values.to(torch.float32), layout.keys, rows.own(messages))
        posted = rows.post(messages, self._tag)
        return _ArrivingCodes(self._gathering, posted, self._quantizer, layout.rows, output)

    def _layout(self, values: Tensor) -> _Layout:
        unit, dtype = self._unit.title, values.dtype
        if dtype not in _DENSE_BITS:
            raise ValueError(
                f"parameters of {unit} are gathered as {str(dtype).removeprefix('torch.')}, as FSDP gathers several "
                "dtypes, and gather_bits encodes float32, bfloat16 and float16; give the parameters one "
                "dtype, or a param_dtype in MixedPrecisionPolicy, or leave gather_bits out"
            )
        if dtype not in self._layouts:
            self._layouts[dtype] = _Layout.of(self._unit, self._quantizer, dtype, self._gathering.rows.order)
        layout = self._layouts[dtype]
        if layout.row.values != values.numel():
            raise RuntimeError(
                f"FSDP gathers {values.numel()} values a rank of {unit}, and its parameters have {layout.row.values}; "
                "attach once all parameters are there"
            )
        return layout


class _Arriving(dist.Work):
    """Rows that are under way, as they are."""

    def __init__(self, gathering: Gathering, posted: PostedGather | _PostedRows) -> None:
        super().__init__()
        self._gathering = gathering
        self._posted: PostedGather | _PostedRows | None = posted

    def wait(self, timeout: Any = None) -> bool:
        """Wait until the output is filled. Calling it twice is harmless."""
        posted, self._posted = self._posted, None
        if posted is not None:
            self._fill(posted.wait())
            self._gathering.under_way -= 1
        return True

    def _fill(self, received: Tensor) -> None:
        """Nothing: they arrive in the output."""


class _ArrivingCodes(_Arriving):
    """Rows that are under way in codes."""

    def __init__(
        self, gathering: Gathering, posted: _PostedRows, quantizer: Nearest, plan: Plan, output: Tensor
    ) -> None:
        super().__init__(gathering, posted)
        self._quantizer, self._plan, self._output = quantizer, plan, output

    def _fill(self, received: Tensor) -> None:
        output = self._output
        decoded = output if output.dtype == torch.float32 else torch.empty_like(output, dtype=torch.float32)
        self._quantizer.decode_plan(self._plan, received, decoded)
        if decoded is not output:
            output.copy_(decoded)


def _repeated(row: Plan, offsets: NDArray[np.int64]) -> Plan:
    """The plan of messages of one kind, one after the other, whose values begin at these offsets."""
    count, nbytes = len(offsets), row.wire_bytes
    return replace(
        row,
        position=(row.position + offsets[:, None]).reshape(-1),
        state_at=(row.state_at + offsets[:, None]).reshape(-1),
        wire_at=(row.wire_at + nbytes * np.arange(count)[:, None]).reshape(-1),
        **{name: np.tile(getattr(row, name), count) for name in ("count", "bits", "slot", "element")},
        message_bytes=row.message_bytes * count,
        values=row.values * count,
    )
