"""Delay of Ctrl-C while the engine must not be interrupted.

Holds one context manager. Must not know engines.
Read next: `longspan.engine.engine`, which must not stop between making a plan and submitting it.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Raise a KeyboardInterrupt that comes inside the block only at its end.

    Does nothing outside the main thread, where Python raises no KeyboardInterrupt, nor where the program has its own
    handler of SIGINT.
    """
    # The thread is asked first: `getsignal` formats a handler that it has no name for, which under asyncio is slow.
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    came = False

    def remember(_signal: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
