"""A shuffle without memory: a keyed permutation of range(size), computed one index at a time.

A shuffled list of a billion samples takes gigabytes on every rank and must be saved for a resume.
A Feistel network with cycle walking computes entry i of a pseudo-random permutation from the key
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002):

    index = left | right          bits split in two halves, 2**bits the first power of two >= size
    left ^= mix(right), right ^= mix(left), ...            each round is invertible: no collisions
    repeat while index >= size                              fewer than two passes on average
"""

from __future__ import annotations

import hashlib
import struct

_ROUNDS = 6
_MASK = (1 << 64) - 1


def keyed_integers(*key: int | str) -> tuple[int, ...]:
    """Returns eight 64-bit integers that depend on `key` alone, on every machine and version."""
    text = "\0".join(str(part) for part in key).encode()
    return struct.unpack("<8Q", hashlib.blake2b(text, digest_size=64).digest())


class Shuffle:
    """A pseudo-random bijection of range(size), a function of `key` alone, in O(1) memory."""

    def __init__(self, size: int, *, key: tuple[int | str, ...]) -> None:
        assert size >= 1, size
        self.size = size
        bits = (size - 1).bit_length()
        self._shift = bits - bits // 2
        self._low = (1 << self._shift) - 1
        self._high = (1 << bits // 2) - 1
        self._keys = keyed_integers("permutation", *key)[:_ROUNDS]

    def __call__(self, index: int) -> int:
        """Returns the image of `index`; both are in [0, size)."""
        assert 0 <= index < self.size, (index, self.size)
        index = self._rounds(index)
        while index >= self.size:
            index = self._rounds(index)
        return index

    def _rounds(self, index: int) -> int:
        left, right = index >> self._shift, index & self._low
        for i in range(0, _ROUNDS, 2):
            left ^= _mix(right ^ self._keys[i]) & self._high
            right ^= _mix(left ^ self._keys[i + 1]) & self._low
        return left << self._shift | right


def _mix(value: int) -> int:
    """Mixes 64 bits so that the low 32 depend on all of them; the constants are splitmix64's."""
    value = value * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 32) * 0x94D049BB133111EB & _MASK
    return value >> 32
