"""What an exchange sent and waited for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """What a number of optimizer steps sent and waited for, on this rank.

    `bytes_dense` is what an all-reduce in float32 would have sent. `ratio` is their quotient, and at one rank, where
    nothing is sent, encoded bytes over 4 bytes a value. `exposed_seconds` are those from the last gradient of backward
    to the last average: what backward did not hide of the exchange. On a GPU they are the host's.
    """

    steps: int
    bytes_sent: float
    bytes_dense: float
    ratio: float
    comm_seconds: float
    codec_seconds: float
    exposed_seconds: float
