"""Model families whose tokens are proven to be those of Transformers.

Holds the table, and the refusal of everything else. Must not know how a family is built.
Read next: `longspan.models.inspect`, which reads a model's facts; `tests/helpers/tiny_models.py` has a small model of
every family, from which the tests of all of them follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version

from longspan.errors import UnsupportedModelError

TRANSFORMERS_VERSIONS = ("5.16", "6")
"""Supported versions of Transformers: from the first, below the second."""


class Need(StrEnum):
    """Property of a family beyond dense layers of full attention."""

    WINDOWS = "sliding windows"
    CHUNKS = "chunked attention"
    SOFTCAP = "softcapped scores"
    SINKS = "attention sinks"
    EXPERTS = "mixture of experts"
    KEYWORDS = "keywords handed on to attention"
    LATENTS = "latent attention"
    STATES = "recurrent layers"


@dataclass(frozen=True, slots=True)
class Family:
    """Row of the table of proven families."""

    since: str = TRANSFORMERS_VERSIONS[0]
    """First version of Transformers with which the family is proven."""
    needs: tuple[Need, ...] = ()


_WINDOWS = Family(needs=(Need.WINDOWS,))
_EXPERTS = Family(needs=(Need.EXPERTS,))
_WINDOWS_EXPERTS = Family(needs=(Need.WINDOWS, Need.EXPERTS))
_LATENTS = Family(needs=(Need.LATENTS,))
_STATES = Family(since="5.24", needs=(Need.STATES,))
_STATES_EXPERTS = Family(since="5.24", needs=(Need.STATES, Need.EXPERTS))
_LATENTS_EXPERTS = Family(needs=(Need.LATENTS, Need.EXPERTS))

PROVEN_FAMILIES: Mapping[str, Family] = {
    "afmoe": _WINDOWS_EXPERTS,
    "apertus": Family(),
    "apertus1p5_text": Family(since="5.24"),
    "arcee": Family(),
    "axk1": _LATENTS_EXPERTS,
    "aria_text": Family(since="5.24", needs=(Need.EXPERTS,)),
    "bamba": _STATES,
    "biogpt": Family(),
    "bitnet": Family(),
    "cohere": Family(),
    "cohere2": _WINDOWS,
    "cohere2_moe": _WINDOWS_EXPERTS,
    "cwm": _WINDOWS,
    "deepseek_v2": _LATENTS_EXPERTS,
    "deepseek_v3": _LATENTS_EXPERTS,
    "dots1": _WINDOWS_EXPERTS,
    "ernie4_5": Family(),
    "ernie4_5_moe": _EXPERTS,
    "exaone": Family(since="5.24"),
    "exaone4": _WINDOWS,
    "exaone_moe": _WINDOWS_EXPERTS,
    "falcon_h1": _STATES,
    "flex_olmo": _EXPERTS,
    "gemma": Family(),
    "gemma2": Family(needs=(Need.WINDOWS, Need.SOFTCAP)),
    "gemma3_text": _WINDOWS,
    "gemma4_text": _WINDOWS_EXPERTS,
    "glm": Family(),
    "glm4": Family(),
    "glm4_moe": _EXPERTS,
    "glm4_moe_lite": _LATENTS_EXPERTS,
    "gpt-sw3": Family(),
    "gpt2": Family(),
    "gpt_bigcode": Family(),
    "gpt_neox": Family(),
    "gpt_oss": Family(needs=(Need.WINDOWS, Need.SINKS, Need.EXPERTS)),
    "granite": Family(),
    "granite_swa": _WINDOWS,
    "granitemoe": _EXPERTS,
    "granitemoe_swa": _WINDOWS_EXPERTS,
    "granitemoehybrid": _STATES_EXPERTS,
    "granitemoeshared": _EXPERTS,
    "helium": Family(),
    "hunyuan_v1_dense": Family(),
    "hunyuan_v1_moe": _EXPERTS,
    "hy_v3": _EXPERTS,
    "hyperclovax": Family(),
    "internlm3": Family(since="5.24"),
    "iquestcoder": Family(since="5.24"),
    "jais2": Family(),
    "kimi_linear": Family(since="5.24", needs=(Need.STATES, Need.LATENTS, Need.EXPERTS)),
    "laguna": _WINDOWS_EXPERTS,
    "lfm2": _STATES,
    "lfm2_moe": _STATES_EXPERTS,
    "llama": Family(),
    "llama4_text": Family(needs=(Need.CHUNKS, Need.EXPERTS)),
    "mellum": _WINDOWS_EXPERTS,
    "mimo_v2_flash": Family(needs=(Need.WINDOWS, Need.SINKS, Need.EXPERTS)),
    "minimax_m2": _EXPERTS,
    "minicpm3": _LATENTS,
    "ministral": _WINDOWS,
    "ministral3": _WINDOWS,
    "mistral": _WINDOWS,
    "mixtral": _WINDOWS_EXPERTS,
    "modernbert-decoder": _WINDOWS,
    "nanochat": Family(),
    "nemotron": Family(needs=(Need.KEYWORDS,)),
    "nemotron_h": _STATES_EXPERTS,
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": _WINDOWS,
    "olmo_hybrid": _STATES,
    "olmoe": _EXPERTS,
    "opt": Family(),
    "persimmon": Family(),
    "phi": Family(),
    "phi3": _WINDOWS,
    "phimoe": _EXPERTS,
    "qwen2": _WINDOWS,
    "qwen2_moe": _WINDOWS_EXPERTS,
    "qwen3": _WINDOWS,
    "qwen3_5_moe_text": _STATES_EXPERTS,
    "qwen3_5_text": _STATES,
    "qwen3_moe": _WINDOWS_EXPERTS,
    "qwen3_next": _STATES_EXPERTS,
    "sarvam_mla": Family(since="5.24", needs=(Need.LATENTS, Need.EXPERTS)),
    "sarvam_moe": Family(since="5.24", needs=(Need.EXPERTS,)),
    "seed_oss": Family(),
    "smollm3": _WINDOWS,
    "solar_open": _EXPERTS,
    "stablelm": Family(needs=(Need.KEYWORDS,)),
    "starcoder2": _WINDOWS,
    "vaultgemma": Family(needs=(Need.WINDOWS, Need.SOFTCAP)),
    "youtu": _LATENTS,
}
"""Per `model_type` of a config: what is proven. The tests compare greedy tokens and log-probabilities of every family
with Transformers, over ranks, strategies and placements."""

_SPARSE_INDEX = (
    "each of its queries attends to keys that a learned index chooses over the whole context, which would need a cache "
    "of index keys and one choice over all ranks"
)

REFUSED_FAMILIES: Mapping[str, str] = dict.fromkeys(
    ("axk2", "deepseek_v32", "deepseek_v4", "glm5_next", "glm_moe_dsa"), _SPARSE_INDEX
)
"""Per `model_type`: why longspan cannot run it as it is."""


TEXT_PARTS: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "llama4": ("llama4_text",),
    "mistral3": ("ministral3", "mistral"),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
}
"""Per `model_type` of a multimodal repository whose text part can be loaded alone: the families that this part has."""


def proven_text_parts() -> list[str]:
    """Return the multimodal repositories whose text part is of a proven family."""
    return [name for name, families in TEXT_PARTS.items() if any(family in PROVEN_FAMILIES for family in families)]


def version_of(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version, which can be compared."""
    return tuple(int(part) for part in text.split(".")[:2])


def installed_version() -> str:
    """Return the version of the installed Transformers, without importing it."""
    return version("transformers")


def check_family(model_type: str) -> None:
    """Refuse a family that is not proven, or not with the installed Transformers.

    Args:
        model_type: the config's field of this name.

    Raises:
        UnsupportedModelError: names the field, its value and the proven values.
    """
    installed = installed_version()
    first, last = TRANSFORMERS_VERSIONS
    if not version_of(first) <= version_of(installed) < version_of(last):
        raise UnsupportedModelError(f"transformers: got {installed!r}, proven is >={first},<{last}")
    family = PROVEN_FAMILIES.get(model_type)
    if model_type in REFUSED_FAMILIES:
        raise UnsupportedModelError(f"model_type: got {model_type!r}, not supported: {REFUSED_FAMILIES[model_type]}")
    if family is None:
        raise UnsupportedModelError(f"model_type: got {model_type!r}, proven is {', '.join(PROVEN_FAMILIES)}")
    if version_of(installed) < version_of(family.since):
        raise UnsupportedModelError(
            f"transformers: got {installed!r}, proven for model_type {model_type!r} is >={family.since}"
        )
