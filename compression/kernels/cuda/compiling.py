"""Compiling for GPUs: Triton does, when a kernel is first launched, and keeps on disk what it made."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

_log = logging.getLogger(__name__)


def tell_of_compiling() -> None:
    """Have one line logged once the first of our kernels was compiled, where Triton's cache had not got it.

    Triton has a hook for the end of compiling and none for its beginning: there it does not know yet whether it must.
    A Triton without that hook compiles in silence.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from triton import knobs

        knobs.compilation.listener = _telling(knobs.compilation.listener)


def _telling(listener: Callable[..., None] | None) -> Callable[..., None]:
    """A listener that calls the one that was there, too."""
    told = False

    def tell(*, src: Any, times: Any, cache_hit: bool, **more: Any) -> None:
        nonlocal told
        if listener is not None:
            listener(src=src, times=times, cache_hit=cache_hit, **more)
        function = getattr(getattr(src, "fn", None), "fn", None)
        if told or cache_hit or not getattr(function, "__module__", "").startswith(f"{__package__}."):
            return
        told = True
        _log.info(
            "compiling the GPU kernels, once on this machine: the first took %.1f s, and the others come in the first "
            "steps",
            times.total / 1e6,
        )

    return tell
