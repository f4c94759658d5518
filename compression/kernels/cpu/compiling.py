"""Compiling for CPUs.

Compiled code releases the GIL. It is cached on disk where a cache folder can be written; where none can, it is compiled
again in each process.
"""

import contextlib
import functools
import gc
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite.binding import Linkage
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

_njit: Any = numba.njit  # its type hints leave out the options that spare wrappers which nobody calls


def jit(function: Callable[..., Any], makes_arrays: bool = False) -> Callable[..., Any]:
    """Compile a kernel at its first call: without the GIL, dividing as numpy does, cached on disk.

    One that makes no arrays, nor slices, counts no references, and compiles sooner.
    """
    kernel: Callable[..., Any] = _njit(
        nogil=True, error_model="numpy", no_cfunc_wrapper=True, pipeline_class=_Kernels, _nrt=makes_arrays
    )(function)
    with contextlib.suppress(RuntimeError):  # numba found no folder that it may write to
        kernel._cache = _Cache(function)  # type: ignore[attr-defined]
    return kernel


def inlined(function: Callable[..., Any], once: bool = False) -> Callable[..., Any]:
    """Compile a part of kernels, with each of them and callable from nowhere else.

    Parts make no arrays and count no references to those that they get: that took up to a fifth of a bucket's time.
    One that is there `once` is not copied to where it is called: calls for a tile cost nothing, and copies an eighth of
    the time to compile.
    """
    part: Callable[..., Any] = _njit(
        error_model="numpy",
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
        _nrt=False,
        pipeline_class=_PartsOnce if once else _Parts,
    )(function)
    return part


jit_with_arrays = functools.partial(jit, makes_arrays=True)
compiled_once = functools.partial(inlined, once=True)


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
    kernels take a third longer to compile.
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

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(self.cache_path, self._impl.filename_base, _sources())

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


@functools.cache
def _sources() -> str:
    kernels = Path(__file__).parents[1]
    files = [*sorted(kernels.rglob("*.py")), kernels.parent / "limits.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
