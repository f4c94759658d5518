"""Codecs: pure functions between gradients and the bytes that stand for them.

A codec knows nothing of ranks, layers or history. It turns R messages of N floats into R messages of
`wire_bytes(N)` bytes and back; everything else is its caller's business. One file per family.

Shapes: R messages, N values per message, B = wire_bytes(N).
"""
