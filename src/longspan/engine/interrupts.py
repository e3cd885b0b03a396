"""Ctrl-C at a bad moment waits for a good one.

Holds one context manager. Must not know engines.
Read next: `longspan.engine.engine`, which must not be left between a plan that is made and a plan that is submitted.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """A KeyboardInterrupt that comes inside is raised at the end.

    Elsewhere than in the main thread nothing needs to be done: Python raises KeyboardInterrupt only there. A program's
    own handler of SIGINT is left alone.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or not is_default:
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
