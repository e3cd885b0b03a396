"""Faster imports of large packages.

Holds one context manager. Must not know which packages.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports(*, for_good: bool) -> Iterator[None]:
    """Import packages inside this context without garbage collection.

    Modules, classes and functions live as long as the process, but Python's collector would search all of them again
    and again while they grow in number: 0.5 of the 2.4 s that torch and Transformers take.

    Args:
        for_good: exclude everything that the process then holds from later collections too, in processes that are the
            program's own. Else these objects join the oldest generation, which is searched seldom.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            is_ours = gc.get_freeze_count() == 0
            gc.freeze()
            if is_ours and not for_good:
                gc.unfreeze()  # what was frozen is now in the oldest generation: not searched at once
            gc.enable()
