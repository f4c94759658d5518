"""The kernels written out in torch: the fast ones are held against them, bit for bit.

`buckets` works on quantization buckets, `arithmetic` is shared by the definitions of quantizers, `sparse` works on the
few values of top-k.
"""

from .buckets import decode, encode, expected_squared_error, recode

__all__ = ["decode", "encode", "expected_squared_error", "recode"]
