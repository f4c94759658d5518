"""The signatures that all kernels have, and the torch definition of a quantizer that they follow.

Shapes: M buckets, K values per bucket, S scales per bucket, L layers.
"""

from typing import Protocol, Self

import numpy as np
from torch import Tensor

from ..layers import Ints
from ..plans import Plan
from ..randomness import Draws
from ..sparse_plans import SparsePlan


class Definition(Protocol):
    """A quantizer in torch operations: from buckets to records, and back."""

    @property
    def family(self) -> str | None:
        """Its name among the fast kernels; None where this definition is all that there is."""

    @property
    def projects(self) -> bool:
        """Whether error feedback scales its code into a projection."""

    def with_bits(self, bits: int) -> Self:
        """The same quantizer at another width."""

    def record_bytes(self, count: int, bits: int) -> int:
        """Exact length of the record of a bucket of `count` values at a width."""

    def encode_vectors(self, vectors_MK: Tensor, draws: Draws, contraction: bool) -> Tensor:
        """The records of buckets, uint8 [M, B]: unbiased, or projections of the buckets where it is a `contraction`."""

    def decode_records(self, records_MB: Tensor, count: int, draws: Draws | None) -> Tensor:
        """The values of records of `count` values each, float32 [M, K]. `draws` are those of encoding, where needed."""

    def expected_squared_errors(self, vectors_MK: Tensor) -> Tensor:
        """E |v - decoded|^2 of each bucket, encoded without bias: float64 [M]."""


class Kernels(Protocol):
    """Work on all buckets of a plan, of any widths. All tensors are contiguous and on one device."""

    def encode(
        self,
        quantizer: Definition,
        plan: Plan,
        values: Tensor,
        keys: np.ndarray,
        wire: Tensor,
        residual: Tensor | None = None,
        pending: Tensor | None = None,
    ) -> None:
        """Write the records of all buckets into `wire`.

        `values` float32 [plan.values], `keys` uint32 [slots, 2], `wire` uint8 [plan.wire_bytes]. With `residual`
        (errors of earlier encodings) and `pending` (float32 as well, addressed by `plan.state_at`), values + residual
        is encoded as a contraction, and the error of this encoding goes to `pending`.
        """

    def decode(
        self,
        quantizer: Definition,
        plan: Plan,
        wire: Tensor,
        out: Tensor,
        factor: float = 1.0,
        accumulate: bool = False,
        keys: np.ndarray | None = None,
    ) -> None:
        """Set `out` to factor x decoded, or add that to it. `keys`: as in `encode`, of quantizers that are keyed."""

    def recode(
        self,
        quantizer: Definition,
        plan: Plan,
        received: Tensor,
        values: Tensor,
        rank: int | None,
        factor: float,
        keys: np.ndarray,
        wire: Tensor,
        residual: Tensor | None = None,
        pending: Tensor | None = None,
        senders: np.ndarray | None = None,
    ) -> None:
        """Add up all ranks' values of one shard, in rank order, times `factor`, and encode the sum.

        Of this rank, which is number `rank`, that is `values`; of the others it is their messages, decoded: `received`
        is uint8 [ranks - 1, plan.wire_bytes]. Where `rank` is None there are only messages. Afterwards the shard in
        `values` holds the encoded sum, decoded again. `senders`: the keys of the messages, [ranks - 1, slots, 2], of
        quantizers that are keyed. The others as in `encode`.
        """

    def expected_squared_error(
        self, quantizer: Definition, plan: Plan, values: Tensor, projected: bool = False
    ) -> float:
        """E |v - decoded|^2 over the rounding, summed over all buckets. `values`: float32 [plan.values].

        With `projected`, that of the projection that error feedback encodes, up to a few percent: a bucket of norm
        n = |v|^2 whose unbiased code has the error q counts q n / (q + n).
        """


class SparseKernels(Protocol):
    """Work on the few values of every layer that are kept. Layer l begins at `at[l]` of a flat buffer."""

    def select(self, plan: SparsePlan, scores: Tensor, at: Ints) -> Tensor:
        """Indices of the k largest magnitudes of every layer, ascending: int64 [sum of k], each within its layer.

        `scores` is float32. Of equal magnitudes the lower index goes first. NaN is larger than infinity, so that it is
        kept.
        """

    def encode(self, plan: SparsePlan, values: Tensor, at: Ints, indices: Tensor, wire: Tensor) -> None:
        """Write the records of all layers into `wire`, uint8 [plan.wire_bytes]. `indices` as `select` returns them."""

    def decode(self, plan: SparsePlan, wire: Tensor, out: Tensor, at: Ints, factor: float = 1.0) -> None:
        """Add factor x value to `out` where the records of all layers say.

        Raises ValueError where a record is damaged; on a GPU, where that would be to wait, adds NaN.
        """
