"""How long a step will take, as far as chunks are cut by it.

Holds arithmetic and one number learnt from finished steps. Must not know clocks: who runs plans reports how long they
took.
Read next: `longspan.scheduler.scheduler`, which cuts chunks.

The unit is flops: of the weights for every token, and of attention for every (query, key) pair. One rate, learnt by an
exponential average, turns them into seconds. It follows by itself when attention, which runs at another rate than
matrix products, takes over in a long prompt.
"""

from longspan.types import ModelSpec

FIRST_FLOPS_PER_S = 20e9
"""Rate per thread assumed before the first step: on the low side, so that the first chunk is not too long."""

LEARNING_RATE = 0.3
MIN_TOKENS = 16
"""Steps with fewer new tokens say little about the rate: they read weights."""


class StepTime:
    """Predicts and learns the time of steps."""

    def __init__(self, model: ModelSpec, num_threads: int) -> None:
        self.token_flops = 2.0 * max(1, model.num_parameters)
        """Of one token through all weights."""
        self._groups = [
            (g.spec.window, 2.0 * len(g.layers) * g.num_query_heads * (g.spec.k_width + g.spec.v_width))
            for g in model.kv_groups
        ]
        self.flops_per_s = FIRST_FLOPS_PER_S * num_threads

    def attention_flops(self, start: int, end: int) -> float:
        """Of queries at positions `[start, end)` and all keys that they see."""
        total = 0.0
        for window, pair_flops in self._groups:
            full_from = end if window is None else max(start, min(end, window))  # from here on a query sees a window
            pairs = (full_from - start) * (start + full_from + 1) / 2
            if window is not None:
                pairs += (end - full_from) * window
            total += pairs * pair_flops
        return total

    def chunk_flops(self, start: int, end: int) -> float:
        """Of tokens `[start, end)`, on all ranks together."""
        return (end - start) * self.token_flops + self.attention_flops(start, end)

    def learn(self, flops: float, num_tokens: int, step_s: float) -> None:
        """Take in how long a step took. Args: `flops` of the rank with most, `num_tokens` of all ranks."""
        if num_tokens >= MIN_TOKENS and step_s > 0:
            self.flops_per_s += LEARNING_RATE * (flops / step_s - self.flops_per_s)
