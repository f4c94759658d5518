"""Averaging of gradients as products of two thin matrices, which the network can add (PowerSGD)."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import randomness
from ..codecs.base import FLOAT32, Floats
from ..codecs.low_rank import gains, sides
from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import Layer
from ..limits import LIMIT
from ..network.collectives import Collectives
from ..plans import PlanCache
from .base import Averager, Sent, all_reduced

# Messages are scaled down by this, so that sums over rows, columns and ranks of the largest floats stay finite.
HEADROOM = 2.0**-20


@dataclass(frozen=True)
class _Matrix:
    """Offsets in flat buffers of a layer of shape [rows, cols] and of its factors, [rows, R] and [R, cols]."""

    rows: int
    cols: int
    rank: int
    gradient_at: int
    residual_at: int
    basis_at: int
    left_at: int
    right_at: int

    def view(self, buffer: Tensor, at: int) -> Tensor:
        return buffer[at : at + self.rows * self.cols].view(self.rows, self.cols)

    def left(self, buffer: Tensor) -> Tensor:
        return buffer[self.left_at : self.left_at + self.rows * self.rank].view(self.rows, self.rank)

    def right(self, buffer: Tensor, at: int) -> Tensor:
        return buffer[at : at + self.rank * self.cols].view(self.rank, self.cols)


@dataclass(frozen=True)
class _Stack:
    """Factors of one shape, side by side in a message: orthonormalized in one call."""

    at: int
    members: int
    side: int  # rows or cols of their layers

    def view(self, message: Tensor, rank: int) -> Tensor:
        return message[self.at : self.at + self.members * self.side * rank]


@dataclass(frozen=True)
class _Plan:
    """The messages of one group of layers: all left factors first, all right factors second, and the dense layers."""

    names: tuple[str, ...]  # of the layers that are factored
    matrices: tuple[_Matrix, ...]
    lefts: tuple[_Stack, ...]
    rights: tuple[_Stack, ...]
    dense: tuple[tuple[slice, slice], ...]  # (in the gradients, among the dense values)
    first_values: int
    second_values: int
    dense_values: int


class PowerSGD(Averager):
    """PowerSGD (Vogels et al. 2019, arXiv:1905.13727, algorithms 1 and 2), 2 (W - 1) / W x 4 R (rows + cols) bytes.

    A layer is a matrix M whose rows are its first dimension. One step of subspace iteration, from where the last
    one ended: P = the sum over ranks of M Q^T, made orthonormal; Q = the mean over ranks of P^T M; the average is P Q.
    All layers' P travel in one all-reduce, all Q in another. Layers that do not gain from it, R (rows + cols) >= rows x
    cols, and those that are not compressed, travel with P in float32, or in a message of their own as `dense` has it.

    Error feedback is part of it: each rank keeps what its own part of the average, P P^T M, leaves of M. The paper
    subtracts the average itself. Both add up to the same over the ranks, and only the sum travels, so that the
    averages are equal. But where ranks see different data, the rank's own part then piles up in its residual step by
    step; here it goes whenever P turns to its directions.

    A vector of Q that comes out zero, as all do of a gradient that is zero, stays what it was: made orthonormal, zeros
    become the first unit vectors, and a layer that is zero there would never be averaged again. The paper is silent.

    The first Q is drawn from `seed`, equal on all ranks. Sums start from the same numbers on all ranks, so that the
    ranks end with the same bits where their machines compute alike.

    Finite for every finite sum of gradient and residual: a column of P Q longer than the largest float is cut there.
    """

    def __init__(
        self,
        rank: int,
        layers: Sequence[Layer],
        collectives: Collectives,
        seed: int,
        dense: Floats = FLOAT32,
    ) -> None:
        self.rank, self.collectives, self.dense = rank, collectives, dense
        self.layers = {layer.name: layer for layer in layers}
        self._seed = seed
        factored = [layer for layer in layers if layer.compressed and gains(*sides(layer.shape), rank)]
        self._residual = LayerState({layer.name: layer.numel for layer in factored})
        self._basis = LayerState({layer.name: rank * sides(layer.shape)[1] for layer in factored})
        self.states = {"residual": self._residual, "basis": self._basis}
        self._plans: PlanCache[_Plan] = PlanCache()

    def average_(self, gradients: Gradients, step: int) -> None:
        plan = self._plans.of(gradients, self._plan)
        flat, network = gradients.flat, self.collectives
        inverse_world_size = 1.0 / network.world_size
        residual, compensated = self._residual.allocate(flat.device, plan.names)
        basis, next_basis = self._bases(flat.device, plan.names)
        both, second = flat.new_empty(plan.first_values + plan.dense_values), flat.new_empty(plan.second_values)
        first, dense = both.split([plan.first_values, plan.dense_values])

        for matrix in plan.matrices:
            gradient, own = matrix.view(flat, matrix.gradient_at), matrix.view(compensated, matrix.residual_at)
            torch.add(gradient, matrix.view(residual, matrix.residual_at), out=own)
            matrix.right(second, matrix.right_at).copy_(matrix.right(basis, matrix.basis_at))
        for stack in plan.rights:
            rows = stack.view(second, self.rank).view(stack.members, self.rank, stack.side)
            rows.copy_(torch.linalg.qr(rows.mT).Q.mT)
        second *= HEADROOM
        for matrix in plan.matrices:
            own = matrix.view(compensated, matrix.residual_at)
            torch.mm(own, matrix.right(second, matrix.right_at).T, out=matrix.left(first))
        for span, dense_span in plan.dense:
            torch.mul(flat[span], inverse_world_size, out=dense[dense_span])
        self._encoded_bytes += self._add_up(both, first, dense) + second.nbytes

        for stack in plan.lefts:
            columns = stack.view(first, self.rank).view(stack.members, stack.side, self.rank)
            columns.copy_(torch.linalg.qr(columns).Q)
        for matrix in plan.matrices:
            left, own = matrix.left(first), matrix.view(compensated, matrix.residual_at)
            own_right = torch.mm((left * HEADROOM).T, own, out=matrix.right(second, matrix.right_at))
            own.addmm_(left, _restored(own_right), alpha=-1.0).clamp_(-LIMIT, LIMIT)
        second *= inverse_world_size
        if plan.matrices:
            network.sum_(second)

        for matrix in plan.matrices:
            right, old = matrix.right(second, matrix.right_at), matrix.right(basis, matrix.basis_at)
            ended = (right == 0).all(1, keepdim=True)
            torch.where(ended, old, right, out=matrix.right(next_basis, matrix.basis_at))
            torch.mm(matrix.left(first), _restored(right), out=matrix.view(flat, matrix.gradient_at))
        for span, dense_span in plan.dense:
            flat[span] = dense[dense_span]

    def _add_up(self, both: Tensor, first: Tensor, dense: Tensor) -> int:
        """Add up the left factors and the dense values, `both` in one buffer, over the ranks. Returns bytes sent."""
        if self.dense.dtype == both.dtype:
            self.collectives.sum_(both)
            return both.nbytes
        rounded = self.dense.rounded(dense)
        for message in (first, rounded):
            if len(message):
                self.collectives.sum_(message)
        dense.copy_(rounded)
        return first.nbytes + rounded.nbytes

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        factored = [layer for layer in layers if layer.name in self._residual.spans]
        rows, cols = (self.rank * sum(sides(layer.shape)[side] for layer in factored) for side in (0, 1))
        dense = sum(layer.numel for layer in layers if layer.name not in self._residual.spans)
        messages = [4 * (rows + dense)]
        if self.dense.dtype != torch.float32:
            messages = [nbytes for nbytes in (4 * rows, self.dense.wire_bytes(dense)) if nbytes]
        messages += [4 * cols] if factored else []
        return functools.reduce(Sent.then, (all_reduced(nbytes, world_size) for nbytes in messages))

    def state_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = state.get("rank", self.rank)
        if saved != self.rank:
            raise ValueError(
                f"the checkpoint holds factors of rank {saved}, and this run makes them of rank {self.rank}; "
                f"resume with `rank` {saved}"
            )
        super().load_state_dict({name: values for name, values in state.items() if name != "rank"})
        if self._basis.current is not None:
            for name in self._basis.spans:  # zeros, which earlier versions could not leave
                vectors = self._basis.current[self._basis.span(name)].view(self.rank, -1)
                ended = (vectors == 0).all(1, keepdim=True)
                vectors.copy_(torch.where(ended, self._drawn(name).view_as(vectors), vectors))

    def _bases(self, device: torch.device, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(current, pending) Q of all layers, drawn at first use.

        The pending ones will be computed of the layers `names`.
        """
        if self._basis.current is None:
            self._basis.current = torch.cat([torch.empty(0), *map(self._drawn, self._basis.spans)])
        return self._basis.allocate(device, names)

    def _drawn(self, name: str) -> Tensor:
        """The first Q of a layer: numbers in [-1/2, 1/2) from the seed."""
        index = np.array([self.layers[name].index], np.int64)
        (key,) = randomness.stream_keys(self._seed, 0, index, 0, 0).astype(np.int64)
        return randomness.uniform(torch.arange(self._basis.spans[name]), *torch.from_numpy(key)) - 0.5

    def _plan(self, gradients: Gradients) -> _Plan:
        starts = dict(zip(gradients.names, gradients.offsets, strict=True))
        factored = [name for name in starts if name in self._residual.spans]
        sizes = {name: sides(self.layers[name].shape) for name in factored}
        left_at, lefts, first_values = self._stacks({name: rows for name, (rows, _) in sizes.items()})
        right_at, rights, second_values = self._stacks({name: cols for name, (_, cols) in sizes.items()})
        matrices = tuple(
            _Matrix(
                *sizes[name],
                rank=self.rank,
                gradient_at=starts[name],
                residual_at=self._residual.offsets[name],
                basis_at=self._basis.offsets[name],
                left_at=left_at[name],
                right_at=right_at[name],
            )
            for name in factored
        )
        dense, dense_values = [], 0
        for name, start in starts.items():
            if name not in sizes:
                count = self.layers[name].numel
                dense.append((slice(start, start + count), slice(dense_values, dense_values + count)))
                dense_values += count
        return _Plan(tuple(factored), matrices, lefts, rights, tuple(dense), first_values, second_values, dense_values)

    def _stacks(self, side_of: Mapping[str, int]) -> tuple[dict[str, int], tuple[_Stack, ...], int]:
        """One side's factors packed, those of one shape together: the offset of each, the stacks, values in all."""
        offsets: dict[str, int] = {}
        stacks = []
        at = 0
        for side in sorted(set(side_of.values())):
            members = [name for name in side_of if side_of[name] == side]
            stacks.append(_Stack(at, len(members), side))
            for name in members:
                offsets[name] = at
                at += side * self.rank
        return offsets, tuple(stacks), at


def _restored(right_RC: Tensor) -> Tensor:
    """A scaled right factor at its true size, its columns no longer than the largest float."""
    length = right_RC.to(torch.float64).square().sum(0).sqrt()
    return (right_RC * (LIMIT * HEADROOM / length).clamp_max(1.0) / HEADROOM).to(torch.float32)
