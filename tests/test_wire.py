"""docs/wire.md: a decoder that is written after that page alone, and knows nothing of the library, reads its messages.

The decoder works on bytes, in plain Python; float32 arithmetic is numpy's.
"""

import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compression
from compression.codecs.base import BFloat16, Float32
from compression.codecs.base import decoded as read_by
from compression.kernels.reference.normal import lloyd_max
from compression.randomness import random_bits, stream_keys

PAGE = (Path(__file__).parents[1] / "docs" / "wire.md").read_text(encoding="utf-8")
Float = np.float32


def floats(raw: bytes) -> list[Float]:
    return list(np.frombuffer(raw, "<f4"))


def stream(raw: bytes, count: int, bits: int) -> list[int]:
    number = int.from_bytes(raw, "little")
    return [number >> (i * bits) & ((1 << bits) - 1) for i in range(count)]


def ternary(raw: bytes, count: int) -> list[int]:
    codes: list[int] = []
    while count > len(codes):
        n = min(2560, count - len(codes))
        size = -(-n // 5)
        tile, raw = raw[:size], raw[size:]
        codes += [tile[i % size] // 3 ** (i // size) % 3 for i in range(n)]
    return codes


def level(name: str, scales: list[Float], code: int, bits: int) -> Float:
    s = 2 ** (bits - 1) - 1
    if name == "maxmin":
        return scales[0] + scales[1] * Float(code)
    if name == "norm_uniform":
        return Float(code - s) * (scales[0] / Float(s))
    if name == "exponential":
        sign = Float((code > s) - (code < s))
        return sign * np.ldexp(Float(1), abs(code - s) - s) * scales[0]
    if name == "terngrad":
        return Float(code - 1) * scales[0]
    return scales[code]


def quantized(name: str, raw: bytes, count: int, bits: int = 1, bucket_size: int = 512) -> Iterator[Float]:
    bucket_size = count if bucket_size == -1 or name == "quantile" else bucket_size
    scale_count = {"maxmin": 2, "1bit": 2, "quantile": 2**bits}.get(name, 1)
    while count:
        n = min(bucket_size, count)
        codes_at, end = 4 * scale_count, 4 * scale_count + (-(-n // 5) if name == "terngrad" else -(-n * bits // 8))
        if name == "terngrad" and n > 2560:
            end = codes_at + n // 2560 * 512 + -(-(n % 2560) // 5)
        scales, packed, raw = floats(raw[:codes_at]), raw[codes_at:end], raw[end:]
        codes = ternary(packed, n) if name == "terngrad" else stream(packed, n, bits)
        yield from (level(name, scales, code, bits) for code in codes)
        count -= n
    assert not raw


def sparse(raw: bytes, count: int, ratio: float) -> Iterator[Float]:
    kept = math.ceil(Fraction(str(ratio)) * count)
    width = int(np.log2(count // kept))
    lows_at = 4 * kept
    rests_at = lows_at + -(-kept * width // 8)
    assert len(raw) == rests_at + -(-(kept + ((count - 1) >> width)) // 8)
    lows = stream(raw[lows_at:rests_at], kept, width)
    ones = [bit for bit, is_set in enumerate(stream(raw[rests_at:], 8 * (len(raw) - rests_at), 1)) if is_set]
    indices = [(bit - i) << width | low for i, (bit, low) in enumerate(zip(ones, lows, strict=True))]
    values = dict(zip(indices, floats(raw[:lows_at]), strict=True))
    yield from (values.get(i, Float(0)) for i in range(count))


def low_rank(raw: bytes, rows: int, cols: int, rank: int) -> Iterator[Float]:
    values, side = np.frombuffer(raw, "<f4"), min(rows, cols)
    if rank * (rows + cols) >= rows * cols:
        yield from values
        return
    short, long = values[: rank * side].reshape(rank, side), values[rank * side :].reshape(rank, -1)
    left, right = (short, long) if rows == side else (long, short)
    yield from sum(np.outer(u, v) for u, v in zip(left, right, strict=True)).reshape(-1)


def stream_key(seed: int, step: int, layer: int, hop: int, rank: int) -> int:
    key = 0
    for part in (seed, step, hop, rank):
        key = mix(key ^ part)
    return mix(layer ^ key)


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def random_word(i: int, key: int) -> int:
    x = (i + key) % 2**32
    x = (x ^ x >> 15) * 0x7FEB352D % 2**32
    x ^= key >> 32
    x = (x ^ x >> 15) * 0x735A2D97 % 2**32
    return x ^ x >> 15


def levels_of(bits: int) -> list[Float]:
    found = re.search(rf"^levels {bits}: ([0-9a-f\s]*)", PAGE, re.MULTILINE)
    assert found is not None
    return [np.frombuffer(bytes.fromhex(word), ">f4")[0] for word in found[1].split()]


def rotated(raw: bytes, count: int, bits: int, bucket_size: int, key: int) -> Iterator[Float]:
    element = 0
    while element < count:
        for n, nbytes in pieces(min(bucket_size, count - element), bits):
            record, raw = raw[:nbytes], raw[nbytes:]
            yield from piece(record, n, bits, element, key) if nbytes != 4 * n else floats(record)
            element += n
    assert not raw


def pieces(n: int, bits: int) -> list[tuple[int, int]]:
    if n == 0 or (n < 64 and 4 * n <= 4 + 8 * bits):
        return [(n, 4 * n)] if n else []
    length = max(64, 2 ** math.ceil(math.log2(n)))
    padded = [(n, 4 + length * bits // 8)]
    if not 64 < n < length:
        return padded
    parted = [(length // 2, 4 + length // 2 * bits // 8), *pieces(n - length // 2, bits)]
    return min(padded, parted, key=lambda each: (sum(nbytes for _, nbytes in each), len(each)))


def piece(record: bytes, n: int, bits: int, element: int, key: int) -> list[Float]:
    length = 8 * (len(record) - 4) // bits
    above = levels_of(bits)
    every = above + [-y for y in above]
    values = [every[code] / Float(length) for code in stream(record[4:], length, bits)]
    turned = {}
    for k, stride in enumerate((16, 32)):
        u = Float(random_word(2**31 + 2 * (element // 32) + k, key) >> 8) * Float(2.0**-24)
        q = u * u
        c, s = ((Float(1) + Float(2) * u) - q) / (Float(1) + q), ((Float(1) - Float(2) * u) - q) / (Float(1) + q)
        turned[stride] = c, s
    for number in (1, 0):
        stride = length // 2
        while stride:
            for i in (i for i in range(length) if i // stride % 2 == 0):
                a, b = values[i], values[i + stride]
                if number == 0 and stride in turned:
                    c, s = turned[stride]
                    values[i], values[i + stride] = c * a + s * b, s * a - c * b
                else:
                    values[i], values[i + stride] = a + b, a - b
            stride //= 2
        words = [random_word(2 * ((element + i) // 32) + number, key) for i in range(0, length, 32)]
        values = [-x if words[i // 32] >> i % 32 & 1 else x for i, x in enumerate(values)]
    scale, limit = floats(record[:4])[0], Float(3.4e38)
    return [np.clip(scale * x, -limit, limit) for x in values[:n]]


def decoded(name: str, options: dict[str, Any], raw: bytes, count: int, seed: int = 0) -> list[Float]:
    if name == "eden":
        return list(rotated(raw, count, **{"bucket_size": 512, **options}, key=stream_key(seed, 0, 0, 0, 0)))
    if name in ("float32", "bfloat16"):
        step = {"float32": 4, "bfloat16": 2}[name]
        return [floats(bytes(4 - step) + raw[i : i + step])[0] for i in range(0, len(raw), step)]
    if name == "topk":
        return list(sparse(raw, count, **options))
    if name == "svd":
        return list(low_rank(raw, **options))
    return list(quantized(name, raw, count, **({"bits": 2} if name == "terngrad" else {}), **options))


def codec(name: str, options: dict[str, Any]) -> Any:
    return {"float32": Float32, "bfloat16": BFloat16}[name]() if "float" in name else compression.codec(name, **options)


def fields(block: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+): +(.*)$", block, re.MULTILINE))


def named(text: str) -> tuple[str, dict[str, Any]]:
    name, *options = text.split()
    pairs = (option.split("=") for option in options)
    return name, {key: float(value) if "." in value else int(value) for key, value in pairs}


BLOCKS = [fields(block) for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)]
EXAMPLES = [block for block in BLOCKS if "codec" in block]


def test_every_codec_has_an_example() -> None:
    shown = {block["codec"].split()[0] for block in EXAMPLES}
    with_codec = {name for name, row in compression.COMPRESSORS.items() if row.quantizer or row.codec}
    assert shown == with_codec | {"float32", "bfloat16"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["codec"])
def test_the_examples_are_what_the_codecs_make_and_what_the_page_says(example: dict[str, str]) -> None:
    name, options = named(example["codec"])
    values = torch.tensor([[float(value) for value in example["values"].split()]])
    wanted = np.array([float(value) for value in example["decoded"].split()], np.float32)
    raw, ours = bytes.fromhex(example["bytes"]), codec(name, options)
    if name != "svd":  # whose vectors are as the machine's linear algebra has them
        assert bytes(ours.encode(values, int(example["seed"]))[0].tolist()) == raw
    close = {"rtol": 1e-6} if name == "svd" else {"rtol": 0}
    np.testing.assert_allclose(decoded(name, options, raw, values.numel(), int(example["seed"])), wanted, **close)
    wire = torch.frombuffer(bytearray(raw), dtype=torch.uint8)[None]
    read = read_by(ours, wire, values.numel(), int(example["seed"]))[0].numpy()
    np.testing.assert_allclose(read, wanted, **close)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_levels_of_the_page_are_those_of_the_definition(bits: int) -> None:
    assert levels_of(bits) == [np.float32(level) for level in lloyd_max(bits)[0]]


def cases(draw: Callable[..., Any]) -> tuple[str, dict[str, Any], int]:
    name = draw(st.sampled_from(sorted(named(example["codec"])[0] for example in EXAMPLES)))
    count = draw(st.integers(1, 60) | st.integers(2500, 6000))
    options: dict[str, Any] = {}
    if name in ("maxmin", "quantile", "norm_uniform", "exponential", "eden"):
        options["bits"] = draw(st.integers(compression.COMPRESSORS[name].min_bits, 8))
    if name in compression.COMPRESSORS and compression.COMPRESSORS[name].quantizer and name != "quantile":
        sizes = [64, 128, 512, 4096] if name == "eden" else [1, 3, 8, 64, 512, 3000, -1]
        options["bucket_size"] = draw(st.sampled_from(sizes))
    if name == "topk":
        options["ratio"] = draw(st.sampled_from([0.001, 0.01, 0.25, 0.6, 1.0]))
    if name == "svd":
        rows, cols = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        options, count = {"rows": rows, "cols": cols, "rank": draw(st.integers(1, 3))}, rows * cols
    return name, options, count


@settings(max_examples=150)
@given(case=st.composite(cases)(), seed=st.integers(0, 2**32), spread=st.sampled_from([0.0, 1.0, 9.0]))
def test_what_the_codecs_make_of_random_values_is_read_to_the_same_bits(
    case: tuple[str, dict[str, Any], int], seed: int, spread: float
) -> None:
    name, options, count = case
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, count, generator=generator) * (spread * torch.randn(1, count, generator=generator)).exp()
    ours = codec(name, options)
    wire = ours.encode(values, seed)
    read = read_by(ours, wire, count, seed)[0].numpy()
    theirs = np.array(decoded(name, options, bytes(wire[0].tolist()), count, seed), np.float32)
    tolerance = 1e-5 * float(values.abs().max()) if name == "svd" else 0.0
    np.testing.assert_allclose(read, theirs, rtol=tolerance and 1e-4, atol=tolerance)


def test_negative_scales_of_error_feedback_and_nan_are_read_alike() -> None:
    wire = np.frombuffer(np.array([-1.5, 0.25], "<f4").tobytes() + b"\x1b", np.uint8)
    for name, options in (("maxmin", {"bits": 2}), ("1bit", {})):
        for scales in (wire, np.frombuffer(b"\0\0\xc0\x7f" * 2 + b"\x1b", np.uint8)):
            ours = compression.codec(name, **options).decode(torch.from_numpy(scales.copy())[None], 4)[0].numpy()
            np.testing.assert_array_equal(ours, np.array(decoded(name, options, scales.tobytes(), 4), np.float32))


def test_random_numbers_are_those_of_the_page() -> None:
    (block,) = [block for block in BLOCKS if "stream" in block]
    parts = dict(re.findall(r"(\w+)=(\d+)", block["stream"]))
    seed, step, layer, hop, rank = (int(parts[name]) for name in ("seed", "step", "layer", "hop", "rank"))
    key = stream_key(seed, step, layer, hop, rank)
    assert f"{key:016x}" == block["key"]
    assert [f"{random_word(i, key):08x}" for i in range(3)] == block["bits"].split()
    halves = stream_keys(seed, step, np.array([layer]), hop, rank)[0].astype(np.int64)
    assert int(halves[1]) << 32 | int(halves[0]) == key
    drawn = random_bits(torch.arange(3), *torch.from_numpy(halves))
    assert drawn.tolist() == [random_word(i, key) for i in range(3)]
