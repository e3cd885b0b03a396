"""Changes of a Transformers model that both its trace and its loaded form need, in their order.

Holds the list. An adaptation changes how a model is called or what it caches, never its results; the trace on the meta
device must see it, since the model's facts follow from the changed model. Must not know plans, ranks or strategies.
Read next: `longspan.models.keywords` and `longspan.models.latent`, one adaptation each; `longspan.models.speedups`,
which are applied later and to loaded models alone.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from longspan.models.chosen_experts import compute_chosen_experts_
from longspan.models.keywords import hand_on_keywords_
from longspan.models.latent import hand_over_latents_
from longspan.models.recurrent import compute_runs_
from longspan.models.row_positions import give_positions_
from longspan.models.row_rope import choose_frequencies_by_row_

ADAPTATIONS: tuple[Callable[[Any], int], ...] = (
    hand_on_keywords_,
    give_positions_,
    compute_chosen_experts_,
    choose_frequencies_by_row_,
    hand_over_latents_,
    compute_runs_,
)
"""Functions that change a model in place, each if it knows the model, and return the number of changed modules."""


def adapt_(model: nn.Module) -> None:
    """Apply all adaptations to a model that was just built or loaded."""
    for change in ADAPTATIONS:
        change(model)
