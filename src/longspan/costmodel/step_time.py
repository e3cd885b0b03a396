"""Predicted time of a step, by which chunks are cut.

Holds arithmetic, and a fit to finished steps. Must not know clocks: the runner of plans reports how long they took.
Read next: `longspan.scheduler.chunks`, which cuts prompts by it.

Note [Time = overhead + flops / rate]
    Flops are those of the weights for every token, and of attention for every (query, key) pair. Overhead and rate are
    fitted to the latest steps (least squares, weights halved every 7 steps), so they follow by themselves when
    attention, which runs at another rate than matrix products, takes over in a long prompt, or when other programs take
    a part of the machine. Without the overhead a slow machine would end in a spiral: chunks get shorter, the overhead
    becomes most of their time, the rate looks lower, chunks get shorter still.
"""

from longspan.types import ModelSpec

FIRST_FLOPS_PER_S = 20e9
"""Rate per thread assumed before the first step: on the low side, so that the first chunk is not too long."""

MEMORY = 0.9
"""Factor on the weights of earlier steps when a new one is learnt."""

MAX_OVERHEAD = 0.6
"""Largest share of the mean step time that is taken for overhead: noise must not explain everything."""

MIN_SPREAD = 0.05
"""Least spread of flops, as a share of their mean, with which overhead is fitted."""


class StepTime:
    """Prediction of step times, fitted to finished steps."""

    def __init__(self, model: ModelSpec, num_threads: int) -> None:
        self.token_flops = 2.0 * max(1, model.active_parameters)
        """Flops of one token through all weights that it meets."""
        self._groups = [(group.spec, len(group.layers) * group.pair_flops()) for group in model.kv_groups]
        self.flops_per_s = FIRST_FLOPS_PER_S * num_threads
        self.overhead_s = 0.0
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # weighted sums of 1, flops, seconds, flops^2, flops * seconds

    def attention_flops(self, start: int, end: int) -> float:
        """Flops of queries at positions `[start, end)` over all keys that they see."""
        return sum(spec.num_pairs(start, end) * pair_flops for spec, pair_flops in self._groups)

    def chunk_flops(self, start: int, end: int) -> float:
        """Flops of tokens `[start, end)`, on all ranks together."""
        return (end - start) * self.token_flops + self.attention_flops(start, end)

    def first_key(self, position: int) -> int:
        """The first position whose key a query at `position` sees in some layer."""
        return min(spec.first_key(position) for spec, _ in self._groups)

    def flops_within(self, step_s: float) -> float:
        """Flops that a rank is predicted to do in a step of `step_s`, a fifth of which is compute at least."""
        return max(step_s / 5, step_s - self.overhead_s) * self.flops_per_s

    def learn(self, flops: float, step_s: float) -> None:
        """Learn from a step that took `step_s`, with `flops` on the rank that had most."""
        if flops <= 0 or step_s <= 0:
            return
        new = (1.0, flops, step_s, flops * flops, flops * step_s)
        self._sums = tuple(MEMORY * old + one for old, one in zip(self._sums, new, strict=True))  # type: ignore[assignment]
        weight, flops_sum, seconds_sum, squares, products = self._sums
        mean_flops, mean_s = flops_sum / weight, seconds_sum / weight
        spread = squares / weight - mean_flops**2
        if spread > (MIN_SPREAD * mean_flops) ** 2:
            slope = (products / weight - mean_flops * mean_s) / spread
            self.overhead_s = mean_s - slope * mean_flops
        self.overhead_s = min(max(0.0, self.overhead_s), MAX_OVERHEAD * mean_s)
        self.flops_per_s = mean_flops / (mean_s - self.overhead_s)
