"""Chosen strategies and their predicted times, as a table for people.

Holds text. Must not know how anything is predicted.
Read next: `longspan.costmodel.explain`, which notes the choices.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports numpy, which no help text needs
    from longspan.costmodel.explain import StrategyChoice
    from longspan.engine.stats import RankStats
    from longspan.scheduler.state_parts import PartsNote
    from longspan.types import ModelSpec


def choices_text(choices: "Sequence[StrategyChoice]") -> str:
    """One paragraph per choice: its strategy and steps, and the predicted time of each candidate."""
    if not choices:
        return "no step has run"
    return "\n".join(_choice_text(choice) for choice in choices)


def shares_text(ranks: "Sequence[RankStats]") -> str | None:
    """Line that says what unequal ranks share; None where they are equal."""
    if len({rank.share for rank in ranks}) == 1 and len({rank.kv_pages_total for rank in ranks}) == 1:
        return None
    each = [f"rank {r.rank} {100 * r.share:.1f} % of a striped prompt, {r.kv_pages_total} KV pages" for r in ranks]
    return f"unequal ranks: {'; '.join(each)}"


def states_text(spec: "ModelSpec", notes: "Sequence[PartsNote]" = ()) -> str | None:
    """Paragraph that says how recurrent layers are computed; None where there are none.

    Args:
        spec: facts of the model.
        notes: in how many parts states were handed from rank to rank.
    """
    num_layers = sum(len(group.layers) for group in spec.state_groups)
    if not num_layers:
        return None
    head = (
        f"recurrent layers: {num_layers} of {spec.num_layers}, {spec.state_bytes / 1e6:.3g} MB of state per request; a "
        "run waits for the state of the run before it, whole or head by head; decode steps are no CUDA graphs"
    )
    return "\n".join([head, *(f"    {_parts_text(note)}" for note in notes)])


def _parts_text(note: "PartsNote") -> str:
    which = "whole" if note.num_parts == 1 else f"in {note.num_parts} parts"
    forced = ", forced," if note.is_forced else ""
    times = f"{note.num_steps} time{'s' * (note.num_steps > 1)}"
    predicted = ""
    if note.predicted_s is not None:
        predicted = f": predicted {note.predicted_s * 1e3:.3f} ms in all layers"
    if note.whole_s is not None and note.num_parts > 1:
        predicted += f", whole {note.whole_s * 1e3:.3f} ms"
    return (
        f"states handed on {which}{forced} {times}; first {note.num_tokens} tokens on {note.num_ranks} ranks{predicted}"
    )


def _choice_text(choice: "StrategyChoice") -> str:
    forced = ", forced" if choice.is_forced else ""
    steps = f"{choice.num_steps} step{'s' * (choice.num_steps > 1)}"
    first = f"{choice.num_queries} token{'s' * (choice.num_queries > 1)} of up to {choice.num_keys}"
    ranks = f"{choice.num_ranks} rank{'s' * (choice.num_ranks > 1)}"
    which = f"{choice.phase}, KV group {choice.group_idx}"
    head = f"{which}: {choice.strategy}{forced} in {steps}; first {first} on {ranks}"
    if not choice.candidates:
        return f"{head}\n    nothing moves: every query has its keys on its own rank"
    lines = [head, "    predicted per layer      total    compute       wait       copy   sent by a rank"]
    for candidate in choice.candidates:
        mark = "*" if candidate.strategy is choice.strategy else " "
        times = (candidate.predicted_s, candidate.compute_s, candidate.wait_s, candidate.copy_s)
        cells = "".join(f"{seconds * 1e3:8.3f} ms" for seconds in times)
        lines.append(f"    {mark} {candidate.strategy:<18}{cells}{candidate.sent_bytes / 1e6:11.3f} MB")
    return "\n".join(lines)
