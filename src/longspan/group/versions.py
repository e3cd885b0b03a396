"""Versions that must be the same on every host: another one could answer with other bits, or other messages.

Holds the look-up. Must not import what it looks up: that takes seconds.
Read next: `longspan.group.membership`, which compares.
"""

import sys
from importlib.metadata import version

from longspan.group.messages import Versions


def own_versions() -> Versions:
    """Of this process."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    longspan, torch, transformers = (version(name).partition("+")[0] for name in ("longspan", "torch", "transformers"))
    return Versions(longspan, python, torch, transformers)
