"""Transformers with a cache that rounds keys and values as ours does: what smaller KV is compared with."""

import transformers
from greedy import generate_greedily
from packaging.version import Version
from transformers import DynamicCache

from longspan.kv.layout import STORED_DTYPES, KVSpec
from longspan.kv.stored import exact_rows, round_rows

CLEAR = 0.01
"""Lead of each token over the next best one: an element that lies between two numbers may become either of them."""
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""Name of the argument of `generate`, which Transformers changed."""


def rounded(states, dtype):
    """Keys or values [batch, heads, T, D] as they are read back, stored as the option `kv_cache_dtype` says."""
    width = states.shape[-1]
    spec = KVSpec.uniform(1, width, width, "float32").stored_as(STORED_DTYPES.get(dtype, dtype))
    component = spec.layout.components[0]
    return exact_rows(round_rows(states, component), width, states.dtype)


class RoundingCache(DynamicCache):
    """Transformers' cache, with keys and values rounded before anything reads them."""

    def __init__(self, config, dtype):
        super().__init__(config=config)
        self._dtype = dtype

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(rounded(key_states, self._dtype), rounded(value_states, self._dtype), *args, **kwargs)


def clear_answer(model, dtype, num_tokens, prompts):
    """The first of some prompts whose greedy tokens are all clear, and these tokens."""
    for prompt in prompts:
        cache = RoundingCache(model.config, dtype)
        tokens, leads = generate_greedily(model, prompt, num_tokens, **{CACHE: cache})
        if min(leads) > CLEAR:
            return prompt, tokens
    raise AssertionError("every prompt meets a near-tie")
