"""Heat map of needles: which were found, by length and depth, and what was answered else.

Holds the drawing. Must not know how a question is asked. Needs matplotlib, the extra `plot`.
Read next: `longspan.cli.needle`.
"""

from collections.abc import Sequence

from longspan.cli.needle import Found, tokens_text
from longspan.cli.pictures import save_figure

COLORS = {"right": "#1a9e77", "wrong number": "#e7a33e", "no number": "#c9413b"}


def write_heat_map(found: Sequence[Found], title: str, path: str) -> None:
    """Draw answers into a PNG file."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lengths, depths = sorted({one.length for one in found}), sorted({one.depth for one in found})
    verdicts = [*COLORS]
    of = {(one.length, one.depth): one for one in found}
    cells = [[verdicts.index(of[length, depth].verdict) for length in lengths] for depth in depths]
    figure = Figure(figsize=(2.2 + 1.0 * len(lengths), 1.9 + 0.5 * len(depths)), layout="constrained")
    axes = figure.subplots()
    axes.pcolormesh(
        cells, cmap=ListedColormap([*COLORS.values()]), vmin=-0.5, vmax=2.5, edgecolors="white", linewidth=2
    )
    for y, depth in enumerate(depths):
        for x, length in enumerate(lengths):
            one = of[length, depth]
            text = (
                f"{one.ttft_s:.1f} s"
                if one.verdict == "right" and one.ttft_s is not None
                else one.answered[:9] or "none"
            )
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color="white", fontsize=8)
    axes.set_xticks([i + 0.5 for i in range(len(lengths))], [tokens_text(length) for length in lengths])
    axes.set_yticks([i + 0.5 for i in range(len(depths))], [f"{depth:g} %" for depth in depths])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("place of the fact")
    num_right = sum(one.verdict == "right" for one in found)
    axes.set_title(f"{title}: {num_right} of {len(found)} right", fontsize=10)
    patches = [Patch(color=color, label=name) for name, color in COLORS.items()]
    labels = ["right, with the seconds to its first token", "a wrong number", "no number"]
    figure.legend(patches, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    for side in axes.spines.values():
        side.set_visible(False)
    save_figure(figure, path)
