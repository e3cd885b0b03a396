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
_BASE = ("rope_theta", "partial_rotary_factor")


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
        is_rope = field in (*_ROPE, *_BASE) and "rope_parameters" in known
        if field == "model_type" and value != fields.get(field):
            raise ConfigError(
                f"hf_overrides: got model_type {value!r}, legal is the model's own, {fields.get(field)!r}"
            )
        if field not in fields and field not in known and not is_rope:
            inner = ", or of its text_config inside of that" if "text_config" in known else ""
            raise ConfigError(f"hf_overrides: got the field {field!r}, legal are fields of the model's config{inner}")
        if is_rope and (isinstance(value, dict) or field in _BASE):
            merged = _with_rope(merged, value if field in _ROPE else {**_rope(merged), field: value})
        elif field.endswith("_config") and isinstance(value, dict) and isinstance(known.get(field), dict):
            merged[field] = merge_overrides(fields.get(field) or {}, value, known[field])
        else:
            merged[field] = value
    return merged


def check_overrides(overrides: Mapping[str, Any], built: Mapping[str, Any]) -> None:
    """Refuse values that the config does not keep: it would run with others than the user asked for.

    Args:
        overrides: as the user gives them.
        built: fields of the config that was built with them.

    Raises:
        ConfigError: names the field, the value and what the config makes of it.
    """
    for field, value in overrides.items():
        if isinstance(value, dict) and isinstance(built.get(field), dict) and field not in _ROPE:
            check_overrides(value, built[field])
        elif field not in (*_ROPE, *_BASE) and not isinstance(value, dict) and built.get(field) != value:
            raise ConfigError(
                f"hf_overrides: got {field} {value!r}, which the model's config makes {built.get(field)!r}; legal is a "
                "value that it keeps"
            )


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE of a file, in either spelling."""
    found: dict[str, Any] = {}
    for name in _ROPE:
        found |= fields.get(name) or {}
    if any(isinstance(value, dict) for value in found.values()):
        raise ConfigError(
            f"hf_overrides: got {' or '.join(_BASE)} of layers that differ, legal is rope_parameters of all"
        )
    return found


def _with_rope(fields: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """See Note [RoPE in two spellings]."""
    before: dict[str, Any] = {}
    for name in _ROPE:
        before |= fields.get(name) or {}
    kept = {name: before[name] for name in _BASE if name in before}
    merged = {name: field for name, field in fields.items() if name not in _ROPE}
    return {**merged, "rope_parameters": {**kept, **value}}
