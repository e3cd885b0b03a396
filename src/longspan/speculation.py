"""Speculative decoding: legal values of the option `speculative_config`, in vLLM's spelling.

Holds the option's meaning and its check. Must not know requests, or how drafts are found.
Read next: `longspan.scheduler.drafting`, which decides how many drafts a step checks.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from longspan.errors import ConfigError
from longspan.option import is_number

FIELD = "speculative_config"
MOST_DRAFTS = 32
"""Most drafts of one request in one step: a step of more rows is no latency any more."""

MOST_LOOKUP = 64
"""Longest n-gram that is looked up."""

_DEFAULT_LOOKUP = 5
_NUMBERS = {
    "num_speculative_tokens": MOST_DRAFTS,
    "prompt_lookup_max": MOST_LOOKUP,
    "prompt_lookup_min": MOST_LOOKUP,
}
_KEYS = {
    "ngram": ("method", *_NUMBERS),
    "draft_model": ("method", "model", "num_speculative_tokens"),
}
"""Legal keys, by method."""


class Speculation(msgspec.Struct, frozen=True):
    """Drafts, wherever they come from."""

    num_drafts: int
    """Most drafts of one request in one step."""


class NgramDrafts(Speculation, frozen=True):
    """Drafts that are looked up in a request's own tokens: what followed when its newest tokens stood there before."""

    longest: int
    """Newest tokens that are looked up first."""
    shortest: int
    """Newest tokens that are looked up where those are not found; may be the same number."""


class ModelDrafts(Speculation, frozen=True):
    """Drafts that a smaller model with the same tokenizer generates."""

    model: str
    """Its directory, or another name of a model."""


def read_speculation(value: object) -> NgramDrafts | ModelDrafts:
    """Read the option's value, a dict.

    Raises:
        ConfigError: the value is illegal.
    """
    if not isinstance(value, Mapping):
        raise _refusal(value, 'a dict such as {"method": "ngram", "num_speculative_tokens": 4}')
    method = value.get("method")
    keys = _KEYS.get(method) if isinstance(method, str) else None
    if keys is None:
        received = f"method {method!r}" if "method" in value else "no method"
        raise _refusal(received, "method 'ngram' or 'draft_model' (drafts of MTP heads are not supported)")
    for key in value:
        if key not in keys:
            raise _refusal(f"the key {key!r}", f"{', '.join(keys)} with method {method!r}")
    for key, most in _NUMBERS.items():
        if key in value and not (is_number(value[key], whole=True) and 1 <= value[key] <= most):
            raise _refusal(f"{key} {value[key]!r}", f"a whole number from 1 to {most}")
    if "num_speculative_tokens" not in value:
        raise _refusal("no num_speculative_tokens", f"a whole number from 1 to {MOST_DRAFTS}")
    return _read_model(value) if method == "draft_model" else _read_ngram(value)


def _read_model(value: Mapping[str, Any]) -> ModelDrafts:
    model = value.get("model")
    if not isinstance(model, str) or not model:
        received = f"model {model!r}" if "model" in value else "no model"
        raise _refusal(received, "a text that names the draft model")
    return ModelDrafts(value["num_speculative_tokens"], model)


def _read_ngram(value: Mapping[str, Any]) -> NgramDrafts:
    shortest = value.get("prompt_lookup_min", value.get("prompt_lookup_max", _DEFAULT_LOOKUP))
    longest = value.get("prompt_lookup_max", shortest)
    if shortest > longest:
        raise _refusal(f"prompt_lookup_min {shortest}", f"at most prompt_lookup_max ({longest})")
    return NgramDrafts(value["num_speculative_tokens"], longest, shortest)


def _refusal(received: object, rule: str) -> ConfigError:
    return ConfigError(f"{FIELD}: got {received}, legal is {rule}")
