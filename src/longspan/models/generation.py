"""What a model's files say of generating: the tokens that end a text, and defaults for sampling.

Holds which of the files count. Must not know requests, nor how files are found.
Read next: `longspan.models.loader`, which loads the files; `longspan.models.inspect`, which uses the end tokens.

Note [End tokens]
    Repositories disagree with themselves: a chat model's `config.json` and `generation_config.json` may name the token
    that ends a text, and only its tokenizer the one that ends a turn. All of them end an answer. Where `config.json`
    does not name one, Transformers fills in the default of the config's class, which the model's authors never wrote:
    beside a `generation_config.json`, `longspan.models.loader` takes it out.
"""

from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from longspan.errors import ConfigError
from longspan.types import SamplingParams

EOS = "eos_token_id"

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of a generation config that are defaults of requests, as in vLLM, beside `max_new_tokens`."""


def end_token_ids(config: PreTrainedConfig, generation_config: GenerationConfig | None) -> tuple[int, ...]:
    """Return the end tokens that a model's configs name, sorted. See Note [End tokens].

    Args:
        config: the model's config.
        generation_config: None if the model has none.

    Raises:
        ConfigError: one of them names something else than token ids.
    """
    named = [getattr(told, EOS, None) for told in (config, generation_config)]
    return tuple(sorted({token_id for value in named for token_id in _as_ids(value)}))


def tokenizer_end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the end token that a tokenizer names, if it names one."""
    return _as_ids(tokenizer.eos_token_id)


def _as_ids(value: object) -> tuple[int, ...]:
    found = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in found):
        raise ConfigError(f"{EOS}: got {value!r}, legal is a token id, a list of token ids, or null")
    return tuple(sorted(set(found)))


def sampling_defaults(generation_config: GenerationConfig | None) -> dict[str, Any]:
    """Return fields of `SamplingParams` that a generation config sets.

    Args:
        generation_config: None, if the model has none, sets nothing.

    Raises:
        ConfigError: a value is illegal.
    """
    if generation_config is None:
        return {}
    told = generation_config.to_diff_dict()
    found = {name: told[name] for name in SAMPLING_FIELDS if told.get(name) is not None}
    if told.get("max_new_tokens") is not None:
        found["max_tokens"] = told["max_new_tokens"]
    try:
        SamplingParams(**found)
    except ConfigError as error:
        raise ConfigError(f"generation_config.json: {error}; --generation-config none leaves it out") from None
    return found
