"""The kernels written out in torch: what the fast ones are held against, bit for bit.

`buckets` works on quantization buckets, `families` says what differs between quantizers, `sparse` writes the records of
a few values.
"""

from .buckets import decode, encode, expected_squared_error, recode

__all__ = ["decode", "encode", "expected_squared_error", "recode"]
