"""Imports of large packages, in less time.

Holds one context manager. Must not know what is imported.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports(*, for_good: bool) -> Iterator[None]:
    """What is made inside is not searched for garbage: modules, classes and functions live as long as the process.

    Python's collector would go through all of it again and again while it grows: 0.5 of the 2.4 s that torch and
    Transformers take.

    Args:
        for_good: never search later either what the process holds by then, for a program's own processes. Else it is
            searched as what has long been there, which is seldom.
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
