"""Advice before a training: what each compressor would do to a step's time on this model, batch and network.

`profile`, `links` and `speeds` measure; `prediction` asks the one cost model (`compression.costs`) what every choice of
the registry would take; `advice` says it. Where nothing can be measured, `simulated` reads a cluster's description.
"""
