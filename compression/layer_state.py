"""State of layers that is kept from step to step: residuals, momenta, running means."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor


class LayerState:
    """Values of some layers that are kept from step to step, float32, and their pending successors.

    `spans` maps a layer's name to the number of values that are kept of it. Those of a layer that a step computes
    nothing of, as it travels dense or not at all, stay as they are.
    """

    def __init__(self, spans: Mapping[str, int]) -> None:
        self.offsets: dict[str, int] = {}
        self.values = 0
        for name, count in spans.items():
            self.offsets[name] = self.values
            self.values += count
        self.spans = dict(spans)
        self.current: Tensor | None = None
        self.pending: Tensor | None = None
        self._computed: set[str] = set()  # the layers whose pending values are of this step

    def allocate(self, device: torch.device, names: Iterable[str]) -> tuple[Tensor, Tensor]:
        """(current, pending) on a device, zeros at first use. Pending values are computed of `names` alone."""
        self._computed.update(names)
        if self.current is None:
            self.current = torch.zeros(self.values, device=device)
        if self.pending is None:
            self.current = self.current.to(device)
            self.pending = torch.zeros(self.values, device=device)
        return self.current, self.pending

    def settle(self, applied: Tensor | bool, layers: Collection[str] | None = None) -> None:
        """Make the values computed since the last time current where `applied`, else drop them.

        Of all layers, or of some: those of the others stay pending. `applied` is a bool scalar; one on a GPU is
        not waited for.
        """
        if layers is not None:
            self._settle_some(applied, self._computed.intersection(layers))
            return
        computed, self._computed = self._computed, set()
        if self.current is None or self.pending is None or not computed:
            return
        for name in self.spans.keys() - computed:
            span = self.span(name)
            self.pending[span] = self.current[span]
        if isinstance(applied, Tensor) and applied.device.type == "cuda":
            torch.where(applied, self.pending, self.current, out=self.current)  # the host does not wait
        elif applied:
            self.current, self.pending = self.pending, self.current

    def revert(self, before: Tensor | None, unless: Tensor | bool) -> None:
        """Put back the current values of an earlier time, a copy of them or None for none, unless a flag is set."""
        if self.current is not None:
            flag = torch.as_tensor(unless, device=self.current.device)
            earlier = torch.zeros_like(self.current) if before is None else before.to(self.current.device)
            torch.where(flag, self.current, earlier, out=self.current)

    def _settle_some(self, applied: Tensor | bool, names: set[str]) -> None:
        self._computed -= names
        for name in names:
            assert self.current is not None
            assert self.pending is not None
            span = self.span(name)
            condition = torch.as_tensor(applied, device=self.current.device)
            torch.where(condition, self.pending[span], self.current[span], out=self.current[span])

    def state_dict(self) -> dict[str, Tensor]:
        if self.current is None:
            return {}
        return {name: self.current[self.span(name)].clone().cpu() for name in self.offsets}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        sizes = {name: values.numel() for name, values in state.items()}
        if sizes and sizes != self.spans:
            differing = sorted(
                name for name in {*sizes, *self.spans} if sizes.get(name) != self.spans.get(name)
            )
            raise ValueError(
                f"the residuals in the checkpoint do not fit the layers: {differing[0]} has "
                f"{sizes.get(differing[0], 0)} values there and {self.spans.get(differing[0], 0)} here"
            )
        self.current = self.pending = None
        self._computed.clear()
        if sizes:
            self.current = torch.cat([state[name].to(torch.float32).reshape(-1) for name in self.offsets])

    def span(self, name: str) -> slice:
        """The slice of a layer's values."""
        return slice(self.offsets[name], self.offsets[name] + self.spans[name])
