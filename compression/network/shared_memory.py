"""The memory that ranks of one host share: they add up through it, on CPUs.

A memfd, not a file of /dev/shm: containers' /dev/shm often holds 64 MB, beyond which a write kills the process. A memfd
has no name, so that nothing is left to remove after a crash and no two jobs meet; its pages exist once they are
written. It goes from one rank to the others over a Unix socket, whose peers belong to the same user.

A rank tells the others how far it is by counters in the memory: no lock and no system call. So that nobody waits for a
rank that has died, each holds a lock on a byte of the memfd, which the kernel lets go of when the process ends.
"""

import fcntl
import mmap
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..streams import Until
from .collectives import Collectives
from .inside import HandedOut, PostedInside, Spans, SummedUp, length, unpack
from .launchers import LOST_ON_HOST

SLOTS = 2  # pieces of a rank that may be in the memory at once
PIECE = 2**22  # values of a buffer that are added up at once, at most
SMALLEST_PIECE = 2**16
BLOCK = 2**16  # values that are added up while they are in the cache
HANDSHAKE_SECONDS = 60.0
LOOK_SECONDS = 0.25  # between looks at whether the others still live

_COUNTERS = 4  # of each rank: pieces copied in, added up, handed out, taken
_LINE = 64  # bytes of a cache line, which no two ranks write
_IN, _SUMMED, _OUT, _TAKEN = range(_COUNTERS)


class SharedMemory:
    """The ranks of one host, in memory that they share.

    Each rank copies a piece of its buffer into a slot of its own, adds up the slices that it owns from the slots of
    all, and later copies the averages of all owners from theirs. Pieces are numbered when buffers are posted, in one
    order on all ranks, and take each step in that order: several buffers can be under way.

    2 slots of a quarter of the gradient for what comes in, at most 2^22 values each, and the R-th part of that for what
    goes out: at R = 2 three quarters of a gradient a rank at most, and 50 MB.

    Raises OSError, on all of these ranks alike, where they cannot share memory.
    """

    overlaps = True

    def __init__(self, network: Collectives, values: int) -> None:
        self.rank, self.world_size = network.rank, network.world_size
        self.piece = min(PIECE, max(SMALLEST_PIECE, -(-values // 4)))
        self.part = -(-self.piece // self.world_size)
        header = self.world_size * _LINE
        nbytes = header + 4 * SLOTS * self.world_size * (self.piece + self.part)
        self._fd, self._mapped = _shared_file(network, nbytes)
        self._counters = np.frombuffer(self._mapped, np.int64, header // 8).reshape(self.world_size, -1)
        floats = torch.frombuffer(self._mapped, dtype=torch.float32, offset=header)
        incoming, outgoing = floats.split([SLOTS * self.world_size * each for each in (self.piece, self.part)])
        self.incoming = incoming.view(SLOTS, self.world_size, self.piece)
        self.outgoing = outgoing.view(SLOTS, self.world_size, self.part)
        self._posted = [0, 0]  # pieces in, and out
        self._looked = 0.0
        self._dead: int | None = None

    def post(self, values: int, spans: Spans) -> PostedInside:
        first_in, first_out = self._posted
        largest = max(map(length, spans))
        self._posted = [first_in - (-values // self.piece), first_out - (-largest // self.part)]
        return _Posted(self, spans, first_in, first_out)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self._counters, self.incoming, self.outgoing, self._mapped  # which goes with its last tensor

    def tell(self, counter: int, pieces: int) -> None:
        """Let the others know that this rank is through with so many pieces."""
        with _FENCE:  # what was written to the slots is seen before the counter is, on every processor
            pass
        with _FENCE:
            self._counters[self.rank, counter] = pieces

    def turn(self, own: int, piece: int, others: int, pieces: int) -> Iterator[Until]:
        """Wait for a piece's turn in one of this rank's steps: all before it are through with that step, and all ranks
        are through with another one of so many pieces.

        Raises RuntimeError where a rank has died.
        """
        counters = self._counters

        def in_turn() -> bool:
            return bool(counters[self.rank, own] == piece and (counters[:, others] >= pieces).all())

        if not in_turn():
            yield Until(lambda: in_turn() or self._has_lost_a_rank())
        with _FENCE:  # what is read from the slots from now on is of after the counters
            pass
        if not in_turn():  # looked at again: it may have ended after it had done its part
            raise RuntimeError(f"the rank at place {self._dead} {LOST_ON_HOST}, and what it shared is lost")

    def _has_lost_a_rank(self) -> bool:
        now = time.monotonic()
        if self._dead is None and now - self._looked > LOOK_SECONDS:
            self._looked = now
            self._dead = next((rank for rank in range(self.world_size) if not self._lives(rank)), None)
        return self._dead is not None

    def _lives(self, rank: int) -> bool:
        """Whether the process of a rank still holds its byte."""
        if rank == self.rank:
            return True
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return True
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, rank)
        return False


class _Posted:
    def __init__(self, memory: SharedMemory, spans: Spans, first_in: int, first_out: int) -> None:
        self._memory, self._spans, self._first_in, self._first_out = memory, spans, first_in, first_out

    def add_up(self, flat: Tensor) -> SummedUp:
        memory, rank = self._memory, self._memory.rank
        own = flat.new_empty(length(self._spans[rank]))
        at = 0
        for k, piece in enumerate(flat.split(memory.piece), start=self._first_in):
            yield from memory.turn(_IN, k, _SUMMED, k + 1 - SLOTS)
            slots = memory.incoming[k % SLOTS]
            torch.mul(piece, 1.0 / memory.world_size, out=slots[rank, : len(piece)])
            memory.tell(_IN, k + 1)
            yield from memory.turn(_SUMMED, k, _IN, k + 1)
            first = (k - self._first_in) * memory.piece
            for start, stop in _within(self._spans[rank], first, first + len(piece)):
                _add_up(slots[:, start - first : stop - first], own[at : at + stop - start])
                at += stop - start
            memory.tell(_SUMMED, k + 1)
        return own

    def hand_out(self, own: Tensor, flat: Tensor) -> HandedOut:
        memory, rank = self._memory, self._memory.rank
        largest = max(map(length, self._spans))
        for k, first in enumerate(range(0, largest, memory.part), start=self._first_out):
            yield from memory.turn(_OUT, k, _TAKEN, k + 1 - SLOTS)
            slots = memory.outgoing[k % SLOTS]
            values = own[first : first + memory.part]
            slots[rank, : len(values)].copy_(values)
            memory.tell(_OUT, k + 1)
            yield from memory.turn(_TAKEN, k, _OUT, k + 1)
            for place, part in enumerate(self._spans):
                unpack(slots[place], flat, list(_some_of(part, first, first + memory.part)))
            memory.tell(_TAKEN, k + 1)


def _within(spans: Sequence[tuple[int, int]], first: int, last: int) -> Iterator[tuple[int, int]]:
    """The parts of spans that lie between two positions of the buffer."""
    for start, stop in spans:
        if max(start, first) < min(stop, last):
            yield max(start, first), min(stop, last)


def _some_of(spans: Sequence[tuple[int, int]], first: int, last: int) -> Iterator[tuple[int, int]]:
    """The parts of spans that are, side by side, the values from `first` to `last`."""
    at = 0
    for start, stop in spans:
        length = stop - start
        if max(at, first) < min(at + length, last):
            yield start + max(first - at, 0), start + min(last - at, length)
        at += length


def _add_up(rows: Tensor, out: Tensor) -> None:
    """The sum of rows, one after the other. float32 [R, n] -> [n]."""
    for at in range(0, len(out), BLOCK):
        total = out[at : at + BLOCK]
        first, second, *others = rows[:, at : at + BLOCK].unbind()
        torch.add(first, second, out=total)
        for row in others:
            total += row


_FENCE = threading.Lock()


def _shared_file(network: Collectives, nbytes: int) -> tuple[int, mmap.mmap]:
    """A memfd of so many bytes, mapped, the same on all ranks, each of which holds its byte of it.

    Raises OSError on all ranks where one of them has none.
    """
    file, mapped, failure = -1, None, ""
    try:
        file = _given_by_the_first(network, nbytes)
        mapped = mmap.mmap(file, nbytes)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, network.rank)
    except (OSError, ValueError, AttributeError) as error:  # no memfd, no socket for it, no file to be had
        failure = str(error) or type(error).__name__
    failures = [each for each in network.collect(failure) if each]
    if failures or mapped is None:
        if file >= 0:
            os.close(file)
        raise OSError(failures[0])
    return file, mapped


def _given_by_the_first(network: Collectives, nbytes: int) -> int:
    """The memfd that rank 0 makes and hands to the others, which know it by a number that nobody guesses."""
    name = "\0gradients-" + network.broadcast(secrets.token_hex(16))
    if network.rank != 0:
        network.collect(None)  # rank 0 listens by now
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(HANDSHAKE_SECONDS)
            connection.connect(name)
            _, [file], _, _ = socket.recv_fds(connection, 1, 1)
            os.set_inheritable(file, False)
            return file
    file = -1
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            file = os.memfd_create("gradients", os.MFD_CLOEXEC)
            os.ftruncate(file, nbytes)
            listener.bind(name)
            listener.listen(network.world_size)
            listener.settimeout(HANDSHAKE_SECONDS)
        finally:
            network.collect(None)
        given = 1
        while given < network.world_size:
            connection, _ = listener.accept()
            with connection:
                credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                if struct.unpack("3i", credentials)[1] == os.getuid():
                    socket.send_fds(connection, [b"\0"], [file])
                    given += 1
    return file
