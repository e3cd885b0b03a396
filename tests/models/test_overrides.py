"""Fields of a config that the user gives stand in place of the file's, and nothing else changes."""

import json
import math

import pytest
import torch
from tiny_models import generate_reference, greedy, random_prompt, run_all, write_model
from transformers import AutoConfig

from longspan.config import EngineConfig, parse_json
from longspan.engine.engine import Engine
from longspan.errors import ConfigError
from longspan.models.inspect import inspect_model
from longspan.models.loader import load_config, load_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def write(path, **fields):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


@pytest.mark.parametrize("given", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "file",
    [
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
)
def test_scaling_replaces_the_files_and_keeps_its_base(tmp_path, file, given):
    path = write(tmp_path, model_type="llama", max_position_embeddings=256, **file)
    config, _ = load_config(path, {given: YARN})
    assert config.rope_parameters == {**YARN, "rope_theta": 5e5}
    assert inspect_model(config, None, torch.float32).max_position == 1024
    again, _ = load_config(path, {given: {**YARN, "rope_theta": 7.0}})
    assert again.rope_parameters["rope_theta"] == 7.0


@pytest.mark.parametrize(
    "file",
    [
        {"rope_theta": 5e5, "rope_scaling": YARN},
        {"rope_theta": 5e5},
        {"rope_parameters": {**YARN, "rope_theta": 5e5}},
    ],
)
def test_another_base_keeps_the_files_scaling(tmp_path, file):
    path = write(tmp_path, model_type="llama", max_position_embeddings=256, **file)
    before, _ = load_config(path)
    config, _ = load_config(path, {"rope_theta": 7.0})
    assert config.rope_parameters == {**before.rope_parameters, "rope_theta": 7.0}
    assert before.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("given", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "file",
    [{"rope_theta": 5e5, "rope_scaling": YARN}, {"rope_parameters": {**YARN, "rope_theta": 5e5}}, {"rope_theta": 5e5}],
)
def test_null_clears_the_files_scaling_in_either_spelling(tmp_path, file, given):
    path = write(tmp_path, model_type="llama", max_position_embeddings=256, **file)
    config, _ = load_config(path, {given: None})
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert inspect_model(config, None, torch.float32).max_position == 256


LINEAR = {"rope_type": "linear", "factor": 8.0}
LAYERS = [
    {"rope_theta": 5e5, "rope_local_base_freq": 7e3, "rope_scaling": LINEAR},
    {
        "rope_parameters": {
            "full_attention": {**LINEAR, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
        }
    },
]
"""RoPE of a family whose types of layers differ in it, in both spellings of files."""


def write_layers(path, file):
    fields = AutoConfig.for_model("gemma3_text").to_dict()
    return write(path, **{name: value for name, value in fields.items() if name != "rope_parameters"} | file)


@pytest.mark.parametrize("file", LAYERS)
@pytest.mark.parametrize("scaling", [YARN, None])
def test_scaling_of_some_layers_keeps_bases_and_the_other_layers(tmp_path, file, scaling):
    config, _ = load_config(write_layers(tmp_path, file), {"rope_parameters": {"full_attention": scaling}})
    assert config.rope_parameters["full_attention"] == {**(scaling or {"rope_type": "default"}), "rope_theta": 5e5}
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 7e3}


@pytest.mark.parametrize("file", LAYERS)
@pytest.mark.parametrize("scaling", [LINEAR, None, {}, {"chunked_attention": LINEAR}])
def test_rejects_one_scaling_for_layers_that_differ(tmp_path, file, scaling):
    with pytest.raises(ConfigError, match="of layers that differ, legal is an object with one or more of "):
        load_config(write_layers(tmp_path, file), {"rope_scaling": scaling})


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_scaling": {"factor": 8.0}},
        {"rope_parameters": {"rope_theta": 7.0}},
        {"rope_parameters": {"full_attention": YARN}},
        {"rope_scaling": {}},
        {"rope_scaling": "yarn"},
        {"rope_scaling": {"rope_type": None}},
    ],
)
def test_rejects_scaling_without_a_type(tmp_path, overrides):
    path = write(tmp_path, model_type="llama", rope_theta=5e5, rope_scaling=YARN)
    with pytest.raises(ConfigError, match=r"hf_overrides: got rope_.*, legal is an object with a rope_type in it"):
        load_config(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_scaling": YARN, "rope_parameters": YARN}, "got both rope_parameters and rope_scaling, legal is one"),
        ({"rope_scaling": None, "rope_parameters": YARN}, "got both rope_parameters and rope_scaling, legal is one"),
        ({"rope_scaling": {**YARN, "rope_theta": 1.0}, "rope_theta": 2.0}, "got rope_theta inside of rope_scaling and"),
    ],
)
def test_rejects_rope_given_twice(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, model_type="llama"), overrides)


def test_inner_configs_are_merged_field_by_field(tmp_path):
    path = write(tmp_path, **AutoConfig.for_model("gemma3").to_dict())
    before, _ = load_config(path)
    config, _ = load_config(path, {"text_config": {"sliding_window": 64}})
    assert (config.sliding_window, config.hidden_size) == (64, before.hidden_size)
    assert config.to_dict() | {"sliding_window": 0} == before.to_dict() | {"sliding_window": 0}


def test_what_a_config_derives_follows(tmp_path):
    path = write(tmp_path, model_type="gemma3_text", num_hidden_layers=4)
    config, _ = load_config(path, {"num_hidden_layers": 7})
    assert len(config.layer_types) == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"rope_scalling": YARN},
            "hf_overrides: got the field 'rope_scalling', legal are fields of the model's config",
        ),
        ({"model_type": "qwen2"}, "hf_overrides: got model_type 'qwen2', legal is the model's own, 'llama'"),
        ({"vision_config": {}}, "hf_overrides: got the field 'vision_config', legal are fields"),
        ({"hidden_size": "many"}, "its config cannot be loaded"),
    ],
)
def test_rejects_overrides_that_fit_no_field(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        load_config(write(tmp_path, model_type="llama"), overrides)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("is_inner", [False, True])
def test_rejects_a_dtype_which_is_an_option(tmp_path, field, is_inner):
    path = write(tmp_path, **AutoConfig.for_model("gemma3").to_dict())
    overrides = {field: "bfloat16"}
    with pytest.raises(ConfigError, match=f"hf_overrides: got {field} 'bfloat16', legal is the option dtype"):
        load_config(path, {"text_config": overrides} if is_inner else overrides)


@pytest.mark.parametrize("overrides", [{"rope_scaling": YARN}, {"hidden_size": 64}])
def test_rejects_fields_of_a_text_part_outside_of_it(tmp_path, overrides):
    path = write(tmp_path, **AutoConfig.for_model("gemma3").to_dict())
    with pytest.raises(ConfigError, match="or of its text_config inside of that"):
        load_config(path, overrides)


@pytest.mark.parametrize("file", LAYERS)
def test_rejects_one_base_for_layers_that_differ(tmp_path, file):
    with pytest.raises(ConfigError, match="of layers that differ"):
        load_config(write_layers(tmp_path, file), {"rope_theta": 7.0})


def test_rejects_a_value_that_the_config_does_not_keep(tmp_path):
    path = write(tmp_path, model_type="gemma4_text", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    with pytest.raises(ConfigError, match=r"hf_overrides: got layer_types .*, which the model's config makes "):
        load_config(path, {"layer_types": ["sliding_attention"] * 2})


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "4", '{"a": NaN', '{"a": NaN}', '{"a": {"b": -Infinity}}', '{"a": 1e999}', '{"a": ' * 10**5]
)
def test_rejects_a_text_that_is_no_json_object(text):
    with pytest.raises(ConfigError, match="hf_overrides: got"):
        parse_json(text, "hf_overrides")


@pytest.mark.parametrize("value", [[], {1: 2}, {"a": {1, 2}}, {"a": {"b": math.nan}}, {"a": math.inf}])
def test_rejects_overrides_that_are_no_json_object(value):
    with pytest.raises(ConfigError, match=r"hf_overrides: got .*, legal is a dict of fields"):
        EngineConfig(model="recall", hf_overrides=value)


def load_tied(path, is_tied):
    return load_model(path, torch.float32, show_progress=False, overrides={"tie_word_embeddings": is_tied})


@pytest.mark.parametrize("in_file", [False, True])
def test_rejects_to_tie_embeddings_that_differ(tmp_path, in_file):
    path = write_model(tmp_path / "model", "llama", tie_word_embeddings=False)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": in_file}))
    with pytest.raises(
        ConfigError, match="got tie_word_embeddings True for a model whose files have output"
    ) as refusal:
        load_tied(path, True)
    assert "\n" not in str(refusal.value)
    assert not torch.equal(load_tied(path, False).lm_head.weight, load_tied(path, False).model.embed_tokens.weight)


def test_embeddings_are_tied_as_asked_where_the_files_have_one_of_them(tmp_path):
    path = write_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    model = load_tied(path, True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match=r"lack 1 tensors, .* such as lm_head"):
        load_tied(path, False)


@pytest.mark.cover
@pytest.mark.parametrize("executor", ["threads", pytest.param("processes", marks=pytest.mark.processes)])
def test_a_model_runs_with_scaling_that_its_file_lacks(tmp_path, executor):
    options = {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112, "max_position_embeddings": 256}
    path = write_model(tmp_path / "plain", "llama", **options)
    yarn = write_model(tmp_path / "yarn", "llama", **options, rope_parameters={**YARN, "rope_theta": 10000.0})
    prompt = random_prompt(300, 1)
    expected = generate_reference(yarn, prompt, 20)
    config = EngineConfig(
        model=path, hf_overrides={"rope_scaling": YARN}, executor=executor, kv_cache_memory=2**24, threads_per_rank=1
    )
    with Engine(config) as engine:
        request = engine.add_request(prompt, greedy(20))
        run_all(engine)
    assert request.output_token_ids == expected.token_ids
