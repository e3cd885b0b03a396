"""Changes of a model's config that the user asks for, as `hf_overrides` of vLLM.

Holds the merge of fields. Must not know what fields mean, but for those of RoPE.
Read next: `longspan.models.loader`, which builds the config of the merged fields.

Note [RoPE in two spellings]
    `rope_scaling` beside `rope_theta` (older files), or `rope_parameters` with `rope_theta` inside. Whichever the file
    has and the user gives, the given value replaces the file's, and base and rotated part stay as the file has them
    unless they are given too:

        file     {"rope_theta": 1e6, "rope_scaling": null}      or {"rope_parameters": {"rope_theta": 1e6, ...}}
        given    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
        merged   {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}}
"""

from collections.abc import Mapping
from typing import Any

from longspan.errors import ConfigError

_ROPE = ("rope_parameters", "rope_scaling")
_KEPT = ("rope_theta", "partial_rotary_factor")


def merge_overrides(
    fields: Mapping[str, Any], overrides: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a config's fields with the user's in place of theirs; those of configs inside are merged one by one.

    Args:
        fields: as the file has them.
        overrides: as the user gives them.
        known: fields of the config that was built of `fields`, defaults included.

    Raises:
        ConfigError: the config has no such field, or the model would become another one.
    """
    merged = dict(fields)
    for field, value in overrides.items():
        if field == "model_type" and value != fields.get(field):
            raise ConfigError(
                f"hf_overrides: got model_type {value!r}, legal is the model's own, {fields.get(field)!r}"
            )
        if field not in fields and field not in known and field not in (*_ROPE, *_KEPT):
            raise ConfigError(f"hf_overrides: got the field {field!r}, legal are fields of the model's config")
        if field in _ROPE and isinstance(value, dict):
            merged = _with_rope(merged, value)
        elif field.endswith("_config") and isinstance(value, dict) and isinstance(known.get(field), dict):
            merged[field] = merge_overrides(fields.get(field) or {}, value, known[field])
        else:
            merged[field] = value
    return merged


def _with_rope(fields: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """See Note [RoPE in two spellings]."""
    before: dict[str, Any] = {}
    for name in _ROPE:
        before |= fields.get(name) or {}
    kept = {name: before[name] for name in _KEPT if name in before}
    merged = {name: value for name, value in fields.items() if name not in _ROPE}
    return {**merged, "rope_parameters": {**kept, **value}}
