"""Pictures that commands write: the check before anything is computed, and the file.

Holds what all pictures share. Must not know what is drawn. Needs matplotlib, the extra `plot`.
Read next: `longspan.cli.plan_plot`, `longspan.cli.needle_plot`.
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plot(path: str) -> None:
    """Refuse a picture that cannot be written, before anything is computed.

    Raises:
        ConfigError: matplotlib is missing, or the file's name or directory will not do.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot: needs matplotlib, which is not installed; legal with pip install 'longspan[plot]'")
    if Path(path).suffix.lower() != ".png":
        raise ConfigError(f"plot: got {path!r}, legal is a file name that ends in .png")
    if not Path(path).parent.is_dir():
        raise ConfigError(f"plot: got {path!r}, legal is a file in a directory that exists")
    if Path(path).is_dir() or not os.access(path if Path(path).exists() else Path(path).parent, os.W_OK):
        raise ConfigError(f"plot: got {path!r}, legal is a file that can be written")


def save_figure(figure: "Figure", path: str) -> None:
    """Write a figure into a PNG file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(f"plot: got {path!r}, legal is a file that can be written: {error.strerror}") from error
