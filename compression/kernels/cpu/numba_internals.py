"""Numba's compiler, changed: kernels compile in six tenths of the time, and run faster on short buckets.

The only module that knows the compiler's inside, which other versions of numba may lack: `compiling` imports it where
numba is the one that it was written for.
"""

import contextlib
import gc
import pickle
from collections.abc import Callable
from typing import Any

import numba
from llvmlite.binding import Linkage
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

_njit: Any = numba.njit  # its type hints leave out the options that spare wrappers which nobody calls


def kernel(function: Callable[..., Any], makes_arrays: bool, stamp: str) -> Callable[..., Any]:
    """A kernel as `compiling.jit` has it, cached on disk for as long as the stamp of its sources is the same."""
    compiled: Callable[..., Any] = _njit(
        nogil=True, error_model="numpy", no_cfunc_wrapper=True, pipeline_class=_Kernels, _nrt=makes_arrays
    )(function)
    with contextlib.suppress(RuntimeError):  # numba found no folder that it may write to
        compiled._cache = _Cache(function, stamp)  # type: ignore[attr-defined]
    return compiled


def part(function: Callable[..., Any], once: bool) -> Callable[..., Any]:
    """A part of kernels as `compiling.inlined` has it.

    Parts make no arrays and count no references to those that they get: that took up to half of a bucket's time.
    """
    compiled: Callable[..., Any] = _njit(
        error_model="numpy",
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
        _nrt=False,
        pipeline_class=_PartsOnce if once else _Parts,
    )(function)
    return compiled


class _Kernel(JITCodeLibrary):
    """LLVM's code of a kernel. Nobody else calls its parts: LLVM may change what they take."""

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.linkonce_odr:
                function.linkage = Linkage.internal
        super()._optimize_final_module()


class _Kernels(Compiler):
    """Numba's compiler, without the garbage collector: looking through what torch keeps takes a tenth of the time.

    What it makes is a `_Kernel`.
    """

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        self.state.library = _Kernel(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        collects = gc.isenabled()
        gc.disable()
        try:
            return super().compile_extra(func)
        finally:
            if collects:
                gc.enable()


class _Part(JITCodeLibrary):
    """LLVM's code of a part, neither optimized nor turned into machine code."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


class _PartOnce(_Part):
    """Likewise, and never copied to where it is called."""

    def add_ir_module(self, ir_module: Any) -> None:
        for function in ir_module.functions:
            if not function.is_declaration:
                function.attributes.add("noinline")
        super().add_ir_module(ir_module)


class _Parts(Compiler):
    """Numba's compiler, but what it makes is only there to be linked into kernels.

    Numba would optimize every part and make machine code of it, and do so again with what calls it. Without this the
    kernels take half as long again to compile.
    """

    _library: type[_Part] = _Part

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        self.state.flags.no_compile = True
        self.state.library = self._library(self.state.targetctx.codegen(), func.__qualname__)
        made = super().compile_extra(func)
        handle: Any = [].append  # nobody calls it: numba tells what it compiled by builtin functions, each its own
        self.state.targetctx.insert_user_function(handle, made.fndesc, [made.library])
        return made._replace(entry_point=handle)


class _PartsOnce(_Parts):
    _library = _PartOnce


class _Cache(FunctionCache):
    """Numba's cache, but what it holds is stale once any kernel's source has changed, whichever file it is in.

    Numba looks at the file of the kernel itself, and misses what the kernel calls. A cache that cannot be read or
    written counts as none.
    """

    def __init__(self, function: Callable[..., Any], stamp: str) -> None:
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(self.cache_path, self._impl.filename_base, stamp)

    def load_overload(self, signature: Any, context: Any) -> Any:
        with contextlib.suppress(Exception):
            return super().load_overload(signature, context)

    def save_overload(self, signature: Any, compiled: Any) -> None:
        with contextlib.suppress(OSError):
            try:
                super().save_overload(signature, compiled)
            except (pickle.UnpicklingError, EOFError):  # the index of what is kept is damaged: begin a new one
                self.flush()
                super().save_overload(signature, compiled)
