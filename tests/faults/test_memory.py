"""Kernels stay within their tensors, at every odd size, and whatever bytes a decoder is given.

numba's own bounds checks do not see what is written in vectors. A kernel that goes astray ends its process, so each
test runs one, which says how far it came.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PRELUDE = """
import itertools, sys
import numpy as np
import torch
from compression import COMPRESSORS, codec
from compression.codecs.sparsifiers import TopK
from compression.randomness import stream_keys
from tests.support.fences import Fenced

torch.set_num_threads(1)
name, full = sys.argv[1], sys.argv[2] == "full"
SIZES = [*range(1, 70), 127, 129, 255, 257, 511, 512, 513, 515, 1023, 1025, 2559, 2560, 2561, 4097]
if not full:
    SIZES = [size for size in SIZES if size < 20 or size > 60]
generator = torch.Generator().manual_seed(0)

def kinds():
    row = COMPRESSORS[name]
    widths = range(row.min_bits, 9) if row.has_bits else [None]
    for bits, bucket_size in itertools.product(widths, (512, 64) if name == "eden" else (512, 7, -1)):
        yield codec(name, **({} if bits is None else {"bits": bits}), bucket_size=bucket_size)
"""

QUANTIZERS = """
for kind, count, at_end in itertools.product(kinds(), SIZES, (True, False)):
    print(kind, count, at_end, flush=True)
    fenced = Fenced(at_end)
    values = fenced.copy(torch.randn(count, generator=generator))
    residual, pending = fenced.copy(torch.zeros(count)), fenced.empty([count], torch.float32)
    out = fenced.copy(torch.zeros(count))
    plan = kind._messages(1, count)
    keys = stream_keys(1, 2, plan.layers, 0, 0)
    wire = fenced.empty([kind.wire_bytes(count)], torch.uint8)
    kind.encode_plan(plan, values, keys, wire)
    kind.decode_plan(plan, wire, out, keys=keys)
    kind.decode_plan(plan, wire, out, 0.5, accumulate=True, keys=keys)
    kind.encode_plan(plan, values, keys, wire, residual, pending)
    received = fenced.copy(torch.stack([wire, wire]))
    senders = np.stack([keys, keys])
    kind.of_averages.recode_plan(plan, received, out, 1, 1 / 3, keys, wire, residual, pending, senders)
    if hasattr(kind, "expected_squared_error"):
        kind.expected_squared_error(values)
    wire.random_(0, 256, generator=generator)  # any bytes decode to something, within the tensors
    kind.decode_plan(plan, wire, out, keys=keys)
    assert fenced.intact(), "written outside of a tensor"
print("done")
"""

SPARSE = """
for ratio, count, at_end in itertools.product((0.001, 0.01, 0.3, 1.0), SIZES, (True, False)):
    print(ratio, count, at_end, flush=True)
    fenced, kind = Fenced(at_end), TopK(ratio)
    values, out = fenced.copy(torch.randn(count, generator=generator)), fenced.copy(torch.zeros(count))
    plan, at = kind.plan([count]), np.zeros(1, np.int64)
    indices = fenced.copy(kind.select(plan, values, at))
    wire = fenced.empty([plan.wire_bytes], torch.uint8)
    kind.encode_plan(plan, values, at, indices, wire)
    kind.decode_plan(plan, wire, out, at)
    assert int((out != 0).sum()) == kind.kept(count)
    for _ in range(20):
        if torch.rand((), generator=generator) < 0.5:
            wire.random_(0, 256, generator=generator)
        else:  # nearly right
            kind.encode_plan(plan, values, at, indices, wire)
            place = int(torch.randint(len(wire), (), generator=generator))
            wire[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        try:
            kind.decode_plan(plan, wire, out, at)
        except ValueError as error:
            assert "damaged" in str(error), error
    assert fenced.intact(), "written outside of a tensor"
print("done")
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


def stays_within(program: str, name: str, how: str) -> None:
    done = run(PRELUDE + program, name, how)
    reached = done.stdout.splitlines()[-1:]
    assert (done.returncode, reached) == (0, ["done"]), f"at {reached}: {done.stderr[-2000:]}"


NAMES = ["maxmin", "exponential", "1bit", "norm_uniform", "terngrad", "quantile", "eden"]


@pytest.mark.parametrize("name", NAMES)
def test_quantizers_stay_within_their_tensors(name: str) -> None:
    stays_within(QUANTIZERS, name, "some")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_quantizers_stay_within_their_tensors_at_every_size(name: str) -> None:
    stays_within(QUANTIZERS, name, "full")


def test_sparse_records_stay_within_their_tensors() -> None:
    stays_within(SPARSE, "topk", "full")


def test_every_quantizer_is_tried() -> None:
    from compression import COMPRESSORS

    assert {name for name, row in COMPRESSORS.items() if row.quantizer is not None} == set(NAMES)


FENCE = """
import ctypes, sys
import torch
from tests.support.fences import Fenced
fenced = Fenced(at_end=sys.argv[1] == "behind")
values = fenced.empty([3], torch.float32)
print("ready", flush=True)
ctypes.memset(values.data_ptr() + (12 if sys.argv[1] == "behind" else -1), 0, 1)
print("survived", flush=True)
"""


@pytest.mark.parametrize("side", ["behind", "before"])
def test_one_byte_beyond_a_fence_ends_the_process(side: str) -> None:
    done = run(FENCE, side)
    assert done.stdout == "ready\n"
    assert done.returncode < 0


PATTERNED = FENCE.replace("12 if", "-1 if").replace("else -1", "else 12") + "sys.exit(0 if fenced.intact() else 3)\n"


@pytest.mark.parametrize("side", ["behind", "before"])
def test_one_byte_on_the_other_side_is_noticed(side: str) -> None:
    assert run(PATTERNED, side).returncode == 3
