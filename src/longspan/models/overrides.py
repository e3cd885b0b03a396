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

    A given `null` means no scaling, in either spelling. Where the types of a config's layers differ in RoPE, the same
    holds in each type that is given, and the other types keep theirs.
"""

from collections.abc import Mapping
from typing import Any

from longspan.errors import ConfigError

_ROPE = ("rope_parameters", "rope_scaling")
_BASE = ("rope_theta", "partial_rotary_factor")
_DTYPE = ("dtype", "torch_dtype")


def merge_overrides(
    fields: Mapping[str, Any], overrides: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a config's fields with the user's in place of theirs; those of configs inside are merged one by one.

    Args:
        fields: as the file has them.
        overrides: as the user gives them.
        known: fields of the config that was built of `fields`, defaults included.

    Raises:
        ConfigError: the config has no such field, the model would become another one, RoPE is not said in full, or
            an option of its own sets the field.
    """
    _check_given_once(overrides)
    merged = dict(fields)
    for field, value in overrides.items():
        is_rope = field in (*_ROPE, *_BASE) and "rope_parameters" in known
        if field == "model_type" and value != fields.get(field):
            raise ConfigError(
                f"hf_overrides: got model_type {value!r}, legal is the model's own, {fields.get(field)!r}"
            )
        if field in _DTYPE:
            raise ConfigError(f"hf_overrides: got {field} {value!r}, legal is the option dtype, which sets it")
        if field not in fields and field not in known and not is_rope:
            inner = ", or of its text_config inside of that" if "text_config" in known else ""
            raise ConfigError(f"hf_overrides: got the field {field!r}, legal are fields of the model's config{inner}")
        if is_rope:
            merged = _with_rope(merged, field, value, known["rope_parameters"] or {})
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


def _check_given_once(overrides: Mapping[str, Any]) -> None:
    """Refuse RoPE in both spellings, and a base inside and outside of it: one of the two would be ignored."""
    spellings = [name for name in _ROPE if name in overrides]
    if len(spellings) > 1:
        raise ConfigError(f"hf_overrides: got both {' and '.join(spellings)}, legal is one of them")
    for name in spellings:
        for base in _BASE:
            if base in overrides and isinstance(overrides[name], dict) and base in overrides[name]:
                raise ConfigError(f"hf_overrides: got {base} inside of {name} and beside it, legal is one of them")


def _with_rope(fields: Mapping[str, Any], field: str, value: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with RoPE, or its base, as given. See Note [RoPE in two spellings].

    Args:
        fields: of the config so far.
        field: name of what is given.
        value: what is given.
        known: `rope_parameters` of the config that was built of the file.
    """
    before: dict[str, Any] = {}
    for name in _ROPE:
        before |= fields.get(name) or {}
    if any(isinstance(part, dict) for part in (*before.values(), *known.values())):
        rope = _layers_rope(field, value, known)
    elif field in _BASE:
        rope = {**before, field: value}
    else:
        rope = _replaced(before, field, value)
    return {**{name: old for name, old in fields.items() if name not in _ROPE}, "rope_parameters": rope}


def _layers_rope(field: str, value: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE of a config whose types of layers differ in it: those that are given replace the file's."""
    layers = {name: part for name, part in known.items() if isinstance(part, dict)}
    if field in _BASE:
        raise ConfigError(
            f"hf_overrides: got {' or '.join(_BASE)} of layers that differ, legal is rope_parameters of all"
        )
    if not isinstance(value, dict) or not value or not value.keys() <= layers.keys():
        raise ConfigError(
            f"hf_overrides: got {field} {value!r} of layers that differ, legal is an object with one or more of "
            f"{', '.join(layers)} in it"
        )
    given = {name: _replaced(layers[name], f"{field} of {name}", part) for name, part in value.items()}
    return layers | given


def _replaced(before: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """RoPE as given, with the base of the one before. A value without a type would be taken for no scaling at all."""
    kept = {base: before[base] for base in _BASE if base in before}
    if value is None:
        return {**kept, "rope_type": "default"}
    if not isinstance(value, dict) or not isinstance(value.get("rope_type", value.get("type")), str):
        raise ConfigError(f"hf_overrides: got {name} {value!r}, legal is an object with a rope_type in it, or null")
    return {**kept, **value}
