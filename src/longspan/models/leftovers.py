"""Tensors of a checkpoint for which the model has no place: which are harmless, and which are a mistake.

Holds the names. Must not know how weights are loaded.
Read next: `longspan.models.loader`, which refuses the others.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from longspan.errors import UnsupportedModelError

_RECOMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that follow from the config, which old versions of Transformers stored."""

_HEADS = {
    "heads that predict further tokens": re.compile(r"(^|\.)(mtp|mtp_layers|nextn)(\.|_)"),
    "heads of a classifier, reward or value model": re.compile(r"^(score|classifier|v_head|value_head|reward_head)\."),
}
"""Parts of other models on the same decoder, by what they are."""

_FURTHER_FIELD = "num_nextn_predict_layers"
_FURTHER_LAYERS = "heads that predict further tokens"


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Names of tensors that the model has no place for."""

    ignored: dict[str, str]
    """What a tensor is, by its name, for those that may be left out; buffers that are computed are not among them."""
    unknown: list[str]
    """All others: the output could be wrong without them."""

    def reasons(self) -> str:
        """Say what is left out."""
        found = {reason: name for name, reason in reversed(self.ignored.items())}
        return "; ".join(f"{reason} ({name}, ...)" for reason, name in found.items())

    def prefixes(self) -> str:
        """Say under which prefix unknown tensors lie if they share one, else nothing."""
        found = {name.split(".")[0] for name in self.unknown if "." in name}
        is_shared = len(found) == 1 and len(self.unknown) > 1
        return f"; all lie under the prefix {found.pop() + '.'!r}" if is_shared else ""


def leftovers(names: Sequence[str], config: PreTrainedConfig) -> Leftovers:
    """Tell harmless tensors from others.

    Args:
        names: tensors that the model has no place for.
        config: the model's config.

    Raises:
        UnsupportedModelError: the config counts layers by something that is no number.
    """
    ignored: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        if _RECOMPUTED.search(name):
            continue
        reason = _reason(name, config)
        if reason is None:
            unknown.append(name)
        else:
            ignored[name] = reason
    return Leftovers(ignored, unknown)


def _reason(name: str, config: PreTrainedConfig) -> str | None:
    """Say why a tensor may be left out, or None if it may not."""
    for reason, pattern in _HEADS.items():
        if pattern.search(name):
            return reason
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    first = config.num_hidden_layers
    if layer is not None and first <= int(layer.group(1)) < first + _num_further(config):
        return _FURTHER_LAYERS
    return None


def _num_further(config: PreTrainedConfig) -> int:
    """Layers past the last that predict further tokens."""
    found = getattr(config, _FURTHER_FIELD, None) or 0
    if not isinstance(found, int):
        raise UnsupportedModelError(f"{_FURTHER_FIELD}: got {found!r}, legal is a whole number from 0")
    return found
