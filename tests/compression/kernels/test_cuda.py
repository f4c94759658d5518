"""The GPU's kernels give the reference's bits, and compile to instructions that can.

Triton runs in processes of its own: on a GPU where there is one, else in its interpreter, which is chosen before Triton
is imported.
"""

import importlib
import importlib.util
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression import codec, kernels, plans
from compression.codecs.quantizer import Quantizer
from compression.codecs.quantizers import Ternary
from compression.kernels import reference
from compression.layers import BFLOAT16, DENSE, Layer, shard
from compression.plans import Plan, Segment
from compression.randomness import stream_keys
from tests.support.quantizers import train_mid_rise
from tests.support.small_training import Trained

TRITON = importlib.util.find_spec("triton")
pytestmark = pytest.mark.skipif(TRITON is None, reason="Triton is not installed")

WIDTHS = {
    "maxmin": range(1, 9),
    "norm_uniform": range(2, 9),
    "exponential": range(2, 9),
    "1bit": [1],
    "terngrad": [2],
    "ternary": [2],
    "quantile": range(1, 9),
    "eden": range(1, 9),
}
ENCODED = [family for family in WIDTHS if family not in ("quantile", "eden")]
TINY, LARGEST = 1e-41, torch.finfo(torch.float32).max
KINDS = {
    "normal": lambda noise: noise,
    "of many scales": lambda noise: noise * (6 * noise.roll(1)).exp(),
    "negative": lambda noise: -noise.abs(),
    "zero": lambda noise: noise * 0,  # of both signs
    "constant": lambda noise: torch.full_like(noise, -2.5),
    "denormal": lambda noise: noise * TINY,
    "huge": lambda noise: (noise * 3e38).clamp(-LARGEST, LARGEST),
    "NaN": lambda noise: noise.where(noise < noise.max(), torch.nan),
    "infinite": lambda noise: noise.where(noise < noise.max(), -torch.inf),
}


def quantizer(family: str) -> Quantizer:
    return Ternary() if family == "ternary" else codec(family)


def bucket_sizes(family: str) -> list[int]:
    return [64, 128, 512, 2048] if family == "eden" else [1, 3, 8, 100, 128, 512, -1]


def kernels_of(family: str) -> ModuleType:
    """The GPU's kernels of a family; Triton is imported with them."""
    return importlib.import_module("compression.kernels.cuda" + (".eden" if family == "eden" else ""))


Layers = list[tuple[int, int, str]]  # of each the values, the bits, and which of KINDS


@pytest.fixture(scope="module")
def gpu() -> Iterator[Executor]:
    with _process(_interpret_without_gpu) as process:
        yield process


def _process(initializer: Callable[..., None], *arguments: str) -> Executor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer, arguments)


def _interpret_without_gpu() -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def fma(_: object, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
            """Rounded once, as GPUs do it (but for ties that doubles hide), where the interpreter rounds twice."""
            exact = x.data.astype(np.float64) * y.data + z.data
            return TensorHandle(exact.astype(np.float32), z.dtype.scalar)

        InterpreterBuilder.create_fma = fma
        # Of a number and a NaN, GPUs give the number.
        InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
        InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)


def layers_for(family: str) -> st.SearchStrategy[Layers]:
    width = st.sampled_from([*WIDTHS[family], DENSE, BFLOAT16])
    return st.lists(st.tuples(st.integers(1, 300), width, st.sampled_from(sorted(KINDS))), min_size=1, max_size=5)


def planned(family: str, layers: Layers, bucket_size: int, world_size: int) -> Plan:
    starts = [0, *accumulate(size for size, _, _ in layers)]
    compressed = [Layer(index, f"layer{index}", (size,), True) for index, (size, _, _) in enumerate(layers)]
    segments = [Segment(layer, at, at) for layer, at in zip(compressed, starts, strict=False)]
    shards = {layer.name: shard(layer.numel, bucket_size, world_size, layer.index) for layer in compressed}
    bits = {layer.name: width for layer, (_, width, _) in zip(compressed, layers, strict=True)}
    rule = None if family == "quantile" else bucket_size
    plan = plans.plan(segments, range(world_size), shards, bits, rule, quantizer(family).record_bytes)
    return quantizer(family).in_pieces(plan)


def differences(
    family: str, layers: Layers, bucket_size: int, world_size: int, feedback: bool, adding: bool
) -> list[str]:
    """Names of what differs after the reference and the GPU's kernels have each done the same work."""
    plan = planned(family, layers, bucket_size, world_size)
    generator = torch.Generator().manual_seed(bucket_size + len(layers))
    values = torch.cat([KINDS[kind](torch.randn(size, generator=generator)) for size, _, kind in layers])
    residual = torch.randn(plan.values, generator=generator)
    keys = stream_keys(1, 2, plan.layers, 0, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for module, target in ((reference, torch.device("cpu")), (kernels_of(family), device)):
        wire = torch.zeros(plan.wire_bytes + 2, dtype=torch.uint8, device=target)
        pending = torch.zeros(plan.values, device=target)
        states = (residual.to(target), pending) if feedback else ()
        record = wire[1:-1]  # at an odd address, with a byte on either side that is not ours
        module.encode(quantizer(family), plan, values.to(target), keys, record, *states)
        decoded = torch.ones(plan.values, device=target)
        module.decode(quantizer(family), plan, record, decoded, 0.3, accumulate=adding, keys=keys)
        found.append((wire.cpu(), pending.cpu(), decoded.cpu()))
    names = ("wire", "pending", "decoded")
    return [name for name, slow, fast in zip(names, *found, strict=True) if not same(slow, fast)]


def differences_of_sums(
    family: str, layers: Layers, bucket_size: int, messages: int, rank: int | None, feedback: bool
) -> list[str]:
    """The same after messages of some ranks, and what this rank has, were added up and encoded."""
    plan = planned(family, layers, bucket_size, 1)
    generator = torch.Generator().manual_seed(bucket_size + messages)
    values = torch.cat([KINDS[kind](torch.randn(size, generator=generator)) for size, _, kind in layers])
    residual = torch.randn(plan.values, generator=generator)
    received = torch.zeros(messages, plan.wire_bytes, dtype=torch.uint8)
    senders = np.stack([stream_keys(1, 2, plan.layers, 1, other) for other in range(messages)])
    for other, message in enumerate(received):
        reference.encode(quantizer(family), plan, values.roll(other), senders[other], message)
    keys = stream_keys(1, 2, plan.layers, 2, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for module, target in ((reference, torch.device("cpu")), (kernels_of(family), device)):
        wire, pending = (
            torch.zeros(count, dtype=dtype, device=target)
            for count, dtype in ((plan.wire_bytes, torch.uint8), (plan.values, torch.float32))
        )
        states = (residual.to(target), pending) if feedback else ()
        own = values.clone().to(target)
        sums = (received.to(target), own, rank, 1 / (messages + 1), keys, wire)
        module.recode(quantizer(family), plan, *sums, *states, senders=senders)
        found.append((wire.cpu(), pending.cpu(), own.cpu()))
    names = ("wire", "pending", "decoded")
    return [name for name, slow, fast in zip(names, *found, strict=True) if not same(slow, fast)]


@pytest.mark.parametrize(("messages", "rank"), [(1, None), (1, 0), (3, 2), (2, 2)])
@pytest.mark.parametrize("family", WIDTHS)
def test_sums_over_ranks_are_encoded_with_the_same_bits(
    gpu: Executor, family: str, messages: int, rank: int | None
) -> None:
    wide = max(WIDTHS[family])
    layers = [(700, wide, "normal"), (130, DENSE, "normal"), (64, min(WIDTHS[family]), "negative"), (9, wide, "zero")]
    layers.append((90, BFLOAT16, "NaN"))
    bucket_size = 128 if family == "eden" else 100
    for feedback in (False, True):
        assert gpu.submit(differences_of_sums, family, layers, bucket_size, messages, rank, feedback).result() == []


def same(slow: Tensor, fast: Tensor) -> bool:
    """The same bits, but for those of a NaN, which depend on the processor."""
    if slow.dtype == torch.uint8:
        return torch.equal(slow, fast)
    bits = slow.view(torch.int32) == fast.view(torch.int32)
    return bool((bits | (slow.isnan() & fast.isnan())).all())


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("family", WIDTHS)
@given(data=st.data())
@settings(deadline=None, max_examples=6)
def test_triton_and_torch_give_the_same_bits(gpu: Executor, family: str, feedback: bool, data: st.DataObject) -> None:
    unit = data.draw(st.sampled_from([1, 4]))  # states moves four values at once where all positions allow it
    layers = [(-(-size // unit) * unit, *rest) for size, *rest in data.draw(layers_for(family))]
    bucket_size = data.draw(st.sampled_from(bucket_sizes(family)))
    world_size, adding = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    assert gpu.submit(differences, family, layers, bucket_size, world_size, feedback, adding).result() == []


@pytest.mark.parametrize("family", WIDTHS)
def test_every_width_and_kind_of_values_in_one_launch(gpu: Executor, family: str) -> None:
    widths = [*WIDTHS[family], DENSE, BFLOAT16]
    for step in (1, 4):
        layers = [(92 - step * index, widths[index % len(widths)], kind) for index, kind in enumerate(KINDS)]
        assert gpu.submit(differences, family, layers, 64, 2, True, True).result() == []


@pytest.mark.parametrize("family", WIDTHS)
def test_buckets_of_several_trees_and_tiles(gpu: Executor, family: str) -> None:
    layers = [(2700, WIDTHS[family][-1], "of many scales"), (2560, WIDTHS[family][0], "negative"), (1500, DENSE, "NaN")]
    assert gpu.submit(differences, family, layers, bucket_sizes(family)[-1], 1, True, False).result() == []


def test_dense_layers_alone_keep_their_bits(gpu: Executor) -> None:
    layers = [(2100, DENSE, "NaN"), (1, DENSE, "huge"), (1101, BFLOAT16, "NaN"), (3, BFLOAT16, "infinite")]
    assert gpu.submit(differences, "maxmin", layers, 8, 1, True, False).result() == []


def test_buckets_too_long_for_a_program_go_beside_those_that_are_not(gpu: Executor) -> None:
    layers = [(40, 3, "normal"), (300, 3, "negative"), (300, DENSE, "normal"), (300, 5, "huge"), (256, 4, "zero")]
    layers.append((260, BFLOAT16, "normal"))
    assert gpu.submit(differences_where_256_is_long, layers).result() == []


def differences_where_256_is_long(layers: Layers) -> list[str]:
    from compression.kernels.cuda import pieces

    with patch.object(pieces, "LONGEST", 256):
        return differences("maxmin", layers, -1, 1, True, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to wait for")
@pytest.mark.parametrize("family", WIDTHS)
def test_the_host_waits_for_nothing_but_the_plan(gpu: Executor, family: str) -> None:
    gpu.submit(work_without_waiting, family).result()


def work_without_waiting(family: str) -> None:
    """RuntimeError where it waits."""
    cuda = kernels_of(family)
    plan, keys = planned(family, [(1000, WIDTHS[family][0], "normal")], 512, 1), np.zeros((1, 2), np.uint32)
    values, wire = torch.ones(1000, device="cuda"), torch.empty(plan.wire_bytes, dtype=torch.uint8, device="cuda")
    try:
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            cuda.encode(quantizer(family), plan, values, keys, wire)
            cuda.decode(quantizer(family), plan, wire, values, keys=keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_plan_is_sent_once_and_forgotten_with_it(gpu: Executor) -> None:
    assert gpu.submit(tables_of_a_plan).result() == (True, 2, 0)


def tables_of_a_plan() -> tuple[bool, int, int]:
    """Whether the second table is the first, and how many are kept while the plan lives and afterwards."""
    from compression.kernels.cuda import pieces

    before = len(pieces._made)
    plan, device = planned("maxmin", [(100, 4, "normal")], 10, 1), torch.device("cpu")
    first, _ = pieces.to_encode(plan, device), pieces.to_decode(plan, device)
    again, kept = pieces.to_encode(plan, device) is first, len(pieces._made) - before
    del plan
    return again, kept, len(pieces._made) - before


@pytest.mark.parametrize(
    ("environment", "installed", "family", "expected"),
    [
        ({"CC": "cc", "PATH": ""}, True, "maxmin", "compression.kernels.cuda"),
        ({"CC": "cc", "PATH": ""}, True, "eden", "compression.kernels.cuda.eden"),
        ({"PATH": ""}, True, "maxmin", "compression.kernels.reference"),  # no compiler
        ({"PATH": ""}, True, "eden", "compression.kernels.reference"),
        ({"CC": "cc", "PATH": ""}, False, "maxmin", "compression.kernels.reference"),
    ],
)
def test_a_gpu_gets_triton_where_it_runs_and_torch_elsewhere(
    gpu: Executor, environment: dict[str, str], installed: bool, family: str, expected: str
) -> None:
    assert gpu.submit(kernels_of_a_gpu, environment, installed, family).result() == expected


def kernels_of_a_gpu(environment: dict[str, str], installed: bool, family: str) -> str:
    kernels_of(family)  # as every other test does it, whatever the environment is here
    kernels._triton_runs.cache_clear()
    with (
        patch.dict(os.environ, environment, clear=True),
        patch.object(kernels, "find_spec", lambda _: installed or None),
    ):
        return kernels.for_device(torch.device("cuda"), family).__name__


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    if not Path(TRITON.origin, "../backends/nvidia/bin/ptxas").resolve().exists():
        pytest.skip("this Triton comes without ptxas")
    with _process(_compile_into, str(tmp_path_factory.mktemp("triton"))) as process:
        yield process


def _compile_into(folder: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = folder


KERNELS = [(kernel, family) for kernel in ("buckets.encode", "buckets.decode") for family in ENCODED]
KERNELS += [("buckets.decode", "quantile"), ("quantiles.codes", "quantile")]
ROTATING = [(f"eden.{name}", "eden") for name in ("encode_rows", "decode_rows")]
OTHERS = [(f"quantiles.{name}", "quantile") for name in ("extremes", "histogram", "level_tables")]
OTHERS.append(("eden.encode_floats", "eden"))
FLOATS = ("values", "residual", "pending", "out", "tables", "levels", "thresholds")
BUFFERS = dict.fromkeys(FLOATS, "*fp32") | {"wire": "*u8"}
NUMBERS = {"table": "*i64", "factor": "fp32", "stride": "i64"}
NUMBERS |= dict.fromkeys(("keys", "ends", "shifts", "counts", "below"), "*i32")
NUMBERS |= dict.fromkeys(("pieces", "ranks", "own", "slots"), "i32")


def assembly(
    kernel: str, family: str, language: str, rows: int = 1, values: int = 1024, warps: int = 32, aligned: bool = False
) -> str:
    """A kernel compiled for an H100, for which no GPU is needed: few values a thread, so that it is quick.

    `aligned`: buffers of floats begin where memory moves several at once.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from compression.kernels import cuda
    from compression.kernels.cuda import launching

    kernels_of(family)
    function = attrgetter(kernel)(cuda)
    shape = {"ALIGNED": rows == 1 or aligned, "M": rows, "Q": values // 4}
    constants = {"FAMILY": family, "FEEDBACK": True, "ACCUMULATE": True, **shape}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = {**BUFFERS, **NUMBERS, **dict.fromkeys(constants, "constexpr")}
    floats = [index for index, name in enumerate(function.arg_names) if aligned and types[name] == "*fp32"]
    known = {(index,): [["tt.divisibility", 16]] for index in floats}
    source = ASTSource(function, {name: types[name] for name in function.arg_names}, constants, known)
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps, **launching.NO_FMA})
    return str(compiled.asm[language])


def lines_while_compiling(folder: str) -> list[list[str]]:
    """What is logged while kernels compile that a cache has not got, twice, and again while it has."""
    import logging

    from triton import knobs

    from compression.kernels import cuda

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log, found = logging.getLogger("compression"), []
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    with patch.object(knobs.compilation, "listener", None), patch.object(knobs.cache, "dir", folder):
        for kernels in (("buckets.decode", "buckets.encode"), ("buckets.decode",)):
            cuda.tell_of_compiling()
            for kernel in kernels:
                assembly(kernel, "maxmin", "ptx")
            found.append(lines.copy())
            lines.clear()
            knobs.compilation.listener = None
    log.removeHandler(handler)
    return found


def test_the_first_kernel_that_compiles_is_told_of_and_none_that_is_kept(compiler: Executor, tmp_path: Path) -> None:
    first, later = compiler.submit(lines_while_compiling, str(tmp_path)).result()
    [line] = first
    assert re.fullmatch(
        r"compiling the GPU kernels, once on this machine: the first took [\d.]+ s, and the others come in the first "
        r"steps",
        line,
    )
    assert later == []


@pytest.mark.parametrize(("kernel", "family"), KERNELS + ROTATING)
def test_compiled_kernels_round_every_operation(compiler: Executor, kernel: str, family: str) -> None:
    code = compiler.submit(assembly, kernel, family, "ptx").result()
    assert re.findall(r"\S*approx\S*|div\.full\S*|\b(?:add|sub|mul|div|sqrt|fma)\S*ftz\S*", code) == []
    written = compiler.submit(assembly, kernel, family, "ttgir").result()
    assert len(re.findall(r"\bfma\.", code)) == written.count("math.fma")  # one value a thread: none was made of others


@pytest.mark.parametrize(("kernel", "family"), KERNELS + OTHERS)
def test_kernels_compile_for_the_shortest_rows(compiler: Executor, kernel: str, family: str) -> None:
    assert compiler.submit(assembly, kernel, family, "ptx", rows=64, values=8, warps=1).result()


@pytest.mark.parametrize(("kernel", "family"), ROTATING)
@pytest.mark.parametrize(("rows", "values"), [(1, 512), (8, 64)])
def test_rows_that_a_warp_rotates_stay_in_its_registers(
    compiler: Executor, kernel: str, family: str, rows: int, values: int
) -> None:
    code = compiler.submit(assembly, kernel, family, "ptx", rows, values, 1, aligned=True).result()
    assert len(re.findall(r"shfl\.sync", code)) >= 2 * 16 * (5 if rows == 1 else 2)  # of 16 values, in two rounds
    assert not re.search(r"\b(?:bar\.sync|[ls][dt]\.(?:shared|local)\S*)", code)


def test_sums_of_floats_add_two_at_a_time(compiler: Executor) -> None:
    code = compiler.submit(assembly, "buckets.encode", "maxmin", "ttgir").result()
    sums = [part for part in code.split('"tt.reduce"')[1:] if "arith.addf" in part.partition("})")[0]]
    axes = [int(re.search(r"axis = (\d)", part)[1]) for part in sums]
    shapes = [re.search(r"\(tensor<([\dx]+)xf32", part)[1].split("x") for part in sums]
    lengths = [shape[axis] for shape, axis in zip(shapes, axes, strict=True)]
    assert lengths == ["2"] * 2 * (9 + 1)  # two trees of 512 terms, and of two trees each


def test_products_are_not_fused_into_sums_by_the_assembler(compiler: Executor) -> None:
    code = compiler.submit(assembly, "buckets.decode", "maxmin", "sass").result()
    assert "FMUL" in code
    assert "FFMA" not in code  # max-min decodes without dividing, which would be made of them


def test_a_quantizer_that_no_kernel_knows_trains(gpu: Executor) -> None:
    trained, served_by = gpu.submit(train_beside_triton).result()
    assert trained.last_loss < trained.first_loss / 2
    assert trained.ranks_agree
    assert trained.ratio < 0.3  # biases travel in float32
    assert served_by == "compression.kernels.reference"


def train_beside_triton() -> tuple[Trained, str]:
    """On a GPU, or with the GPU's kernels in the interpreter in place of the CPU's."""
    from compression.kernels import cuda

    if torch.cuda.is_available():
        return train_mid_rise("cuda")
    with patch.object(kernels, "cpu", cuda):
        assert kernels.for_device(torch.device("cpu"), "maxmin") is cuda
        return train_mid_rise("cpu")
