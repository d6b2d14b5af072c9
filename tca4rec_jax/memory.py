"""The host's memory: what a process keeps of what was freed, and when it looks for garbage."""

import ctypes
import gc

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h
_LIBC = ctypes.CDLL(None)


def collect_garbage_rarely() -> None:
    """Tracing makes objects by the million; looking for cycles among them takes 5% of its time."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def keep_freed_pages() -> None:
    """Makes glibc reuse the pages of large temporaries instead of returning them to the kernel.

    By default glibc maps, faults in and unmaps a large array at every step, which on CPU can take
    as long as the arithmetic. Threads share one arena, since the thresholds do not hold in others.
    Arenas that exist already (pandas starts a thread, by Arrow) stay in use: huge pages, as in
    launch/quickstart.sh, make that cheap. Other C libraries are left as they are.
    """
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_MMAP_MAX, 0)
        _LIBC.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        _LIBC.mallopt(_TOP_PAD, 2**28)
        _LIBC.mallopt(_ARENA_MAX, 1)


def return_freed_pages() -> None:
    """Returns to the kernel, once, the pages that glibc keeps; they come back as they are used."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(ctypes.c_size_t(0))
