"""Versions that must be equal on every host, since other versions may compute other bits or send other messages.

Holds the look-up. Must not import the packages it looks up: that takes seconds.
Read next: `longspan.group.membership`, which compares them.
"""

import sys
from importlib.metadata import version

from longspan.group.messages import Versions


def own_versions() -> Versions:
    """Versions in this process."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    longspan, torch, transformers = (version(name).partition("+")[0] for name in ("longspan", "torch", "transformers"))
    return Versions(longspan, python, torch, transformers)
