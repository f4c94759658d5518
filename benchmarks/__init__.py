"""One script per claim in BENCHMARKS.md; each prints its table with the hardware and the versions it ran on."""
