"""Bounds that all codecs keep, so that finite values stay finite."""

LIMIT = 3.4e38  # of magnitudes and ranges: below the largest float32, so that no level overflows by rounding
HUGE = 1e30  # levels beyond this are not made larger
TINY = 2.0**-126  # the smallest float32 that is not denormal
