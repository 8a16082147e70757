"""Memory of a process on CPUs: kept when it is freed, and in large pages.

A step frees and takes the same gigabytes again and again. glibc gives large blocks back to the system at once, which clears each page
of 4 KiB anew when it is next touched, and so many pages are more than a processor's table of addresses holds. Here the heap keeps what
is freed, and lies in pages of 2 MiB where the system has them on request (Linux, transparent_hugepage "madvise").
"""

from __future__ import annotations

import ctypes
import mmap
import resource

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_PAGE = 2 << 20
PIECE = 1 << 30
"""Bytes asked for at a time: more than a machine has is refused."""


def use_huge_pages(size: int) -> None:
    """Have up to `size` bytes of the heap in large pages, and none of it given back before the process ends.

    They are addresses, and become memory as they are used. Without glibc, or where addresses are limited, nothing changes.
    """
    libc = ctypes.CDLL(None)
    limited = any(
        resource.getrlimit(limit)[0] != resource.RLIM_INFINITY
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    )
    if limited or not hasattr(libc, "mallopt") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    libc.mallopt(M_MMAP_THRESHOLD, (1 << 31) - 1)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pieces = []
    for _ in range(size // PIECE):
        piece = libc.malloc(PIECE)
        if not piece:
            break
        pieces.append(piece)
        start = -(-piece // LARGE_PAGE) * LARGE_PAGE
        libc.madvise(start, (piece + PIECE - start) // LARGE_PAGE * LARGE_PAGE, mmap.MADV_HUGEPAGE)
    for piece in pieces:
        libc.free(piece)
