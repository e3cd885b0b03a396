"""Room for an answer: the most tokens that can follow a prompt.

Holds the search for it. Must not know engines, whose check of one length it calls.
Read next: `Engine.check_fits` in `longspan.engine.engine`.
"""

from collections.abc import Callable

from longspan.errors import CapacityError, ConfigError


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to `most` that fits, if all below it do; 1 if none does."""
    least, most = 1, max(1, most)
    if fits(most):
        return most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def find_room(prompt_len: int, most_tokens: int, check_fits: Callable[[int, int], None], wanted: int | None) -> int:
    """Return the most tokens that can follow a prompt; at least 1, so that submitting it says what is wrong.

    Args:
        prompt_len: tokens of the prompt.
        most_tokens: length, prompt and answer together, that no request exceeds.
        check_fits: refuses (prompt length, number of tokens) that do not fit by a `CapacityError` or `ConfigError`.
        wanted: no more than this is asked for; None looks for all.
    """
    most = most_tokens - prompt_len if wanted is None else min(wanted, most_tokens - prompt_len)

    def fits(max_tokens: int) -> bool:
        try:
            check_fits(prompt_len, max_tokens)
        except (CapacityError, ConfigError):
            return False
        return True

    return largest(most, fits)
