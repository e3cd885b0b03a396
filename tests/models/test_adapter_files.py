"""An adapter of requests is read as peft reads it, and refused by name where it asks for more than products."""

import json
import re
import shutil

import pytest
import torch
from lora_adapters import TARGETS, peft, tiny_adapter, write_adapter
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.errors import ConfigError
from longspan.models.adapter_files import AdapterFiles, adaptable_modules
from longspan.models.loader import load_config, model_on_meta
from longspan.models.lora import ADAPTER_CONFIG, WEIGHTS_NAME

CPU = torch.device("cpu")


def modules_of(path):
    return adaptable_modules(model_on_meta(load_config(path)[0], torch.float32))


def products(directory, path=None):
    return AdapterFiles(str(directory)).products(modules_of(path or tiny_model("llama").path), torch.float32, CPU)


@pytest.fixture
def adapter(tmp_path):
    """A copy of an adapter that a test may spoil."""
    shutil.copytree(tiny_adapter("llama", "a"), tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(adapter, **fields):
    path = adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(adapter, change):
    save_file(change(load_file(adapter / WEIGHTS_NAME)), adapter / WEIGHTS_NAME)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers.1.self_attn.v_proj": 20, "down_proj": 3}},
        {"layers_to_transform": [0, 2], "exclude_modules": ["o_proj"]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*\.(q|gate)_proj", "init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
    ],
)
def test_products_are_what_peft_merges(options, tmp_path):
    path = tiny_model("llama").path
    write_adapter(tmp_path, path, seed=3, **{"target_modules": TARGETS, **options})
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload().state_dict()
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], merged[name])}
    found = products(tmp_path)
    assert found.keys() == changed
    for name, product in found.items():
        torch.testing.assert_close((product.a @ product.b).t(), merged[f"{name}.weight"] - before[f"{name}.weight"],
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def refuses(adapter, message, path=None):
    with pytest.raises(ConfigError, match=f"^lora: got '{re.escape(str(adapter))}', legal is .*{message}"):
        products(adapter, path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "without use_dora, which is True; merged"),
        ({"modules_to_save": ["lm_head"]}, r"without modules_to_save, which is \['lm_head'\]"),
        ({"bias": "all"}, "without biases; its bias is 'all'"),
        ({"lora_bias": True}, "without lora_bias"),
        ({"trainable_token_indices": [5]}, "without trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "without target_parameters"),
        ({"layer_replication": [[0, 3]]}, "without layer_replication"),
        ({"alora_invocation_tokens": [1]}, "without alora_invocation_tokens"),
        ({"a_field_of_next_year": 1}, "without a_field_of_next_year, which is 1"),
        ({"init_lora_weights": "pissa"}, "leaves the base's weights alone; its init_lora_weights is 'pissa'"),
        ({"peft_type": "LOHA"}, "of peft_type LORA; this one is 'LOHA'"),
        ({"r": 5}, r"down_proj has lora_A \[4, 96\] and lora_B .*, its config and the model ask for \[5, 96\]"),
        ({"rank_pattern": {"v_proj": 3}}, "v_proj has lora_A .*ask for"),
        ({"lora_alpha": "x"}, "r and lora_alpha are numbers above 0"),
        ({"target_modules": [*TARGETS, "up_proj"]}, r"3 of its modules have no tensors, such as .*up_proj"),
    ],
)
def test_rejects_configs_that_ask_for_more(adapter, fields, message):
    change(adapter, **fields)
    refuses(adapter, message)


Q_PROJ = "layers.1.self_attn.q_proj"


def renamed(tensors, **others):
    """Tensors of layer 2 under the names of a layer that is not there, with `others`."""
    return {name.replace("layers.2.", "layers.7."): tensor.clone() for name, tensor in tensors.items()} | others


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: {}, "with tensors; this one has none"),
        (
            lambda t: t | {"base_model.model.lm_head.weight": torch.ones(2)},
            "this one has base_model.model.lm_head.weight",
        ),
        (lambda t: {k: v for k, v in t.items() if f"{Q_PROJ}.lora_B" not in k}, "q_proj has one of them"),
        (lambda t: {k: v for k, v in t.items() if Q_PROJ not in k}, "1 of its modules have no tensors"),
        (lambda t: {k: v / 0 if Q_PROJ in k else v for k, v in t.items()}, "those of .*q_proj are not"),
        (renamed, "have no tensors, such as .*layers.2"),
        (lambda t: renamed(t, **t), "layers.7.* not in this model"),
    ],
)
def test_rejects_tensors_that_do_not_fit(adapter, spoil, message):
    change_tensors(adapter, spoil)
    refuses(adapter, message)


def test_rejects_files_that_are_not_there_or_broken(adapter, tmp_path):
    (adapter / WEIGHTS_NAME).write_bytes((adapter / WEIGHTS_NAME).read_bytes()[:-9])
    refuses(adapter, "a file adapter_model.safetensors of whole safetensors")
    (adapter / ADAPTER_CONFIG).write_text("[]")
    refuses(adapter, "is JSON of an object")
    (adapter / ADAPTER_CONFIG).unlink()
    refuses(adapter, "a directory with adapter_config.json and adapter_model.safetensors: No such file")


def test_rejects_an_adapter_of_another_model():
    refuses(
        tiny_adapter("llama", "a"),
        "down_proj has lora_A .* the model ask for|q_proj has lora_A .* the model ask for",
        tiny_model("qwen2").path,
    )


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (["embed_tokens"], "has base_model.model.model.embed_tokens"),
        (["lm_head"], "has base_model.model.lm_head"),
    ],
)
def test_rejects_embeddings_and_logits(targets, what, tmp_path):
    refuses(write_adapter(tmp_path, tiny_model("llama").path, target_modules=targets), what)


@pytest.mark.cover
def test_modules_that_see_some_rows_alone_are_not_adapted():
    found = modules_of(tiny_model("qwen3_moe").path)
    assert "model.layers.0.self_attn.q_proj" in found.shapes
    assert "model.layers.1.mlp.up_proj" in found.shapes, "the dense layer"
    assert found.refused["model.layers.0.mlp.gate"] == "part of a mixture of experts"
    assert not any("layers.0.mlp" in name for name in found.shapes)
    latents = modules_of(tiny_model("youtu").path)
    assert latents.refused["model.layers.0.self_attn.kv_b_proj"] == "the projection of latents"
    assert "model.layers.0.self_attn.q_b_proj" in latents.shapes


def test_rejects_an_adapter_of_a_mixture_before_weights_are_loaded(adapter):
    """The driver reads it before ranks start."""
    config = EngineConfig(model=tiny_model("qwen3_moe").path, executor="threads", lora={"a": str(adapter)})
    with pytest.raises(ConfigError, match=r"^lora: got 'a=.*down_proj is part of a mixture of experts"):
        Engine(config)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (["a=x", "a=y"], "lora: got 'a=y', whose name is that of another adapter, legal is another one"),
        (["m=x"], "lora: got 'm=x', whose name is that of the model"),
        (["x", "y"], "lora: got 2 without a name, legal is one"),
        (["a="], "lora: got 'a=', legal is a directory behind the name"),
        (["a b=x"], "lora: got 'a b=x', legal is a name of at most 64 letters"),
        ([""], "lora: got "),
        (3, "lora: got 3, legal is NAME=DIR or DIR"),
    ],
)
def test_rejects_entries_of_the_option(lora, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineConfig(model="m", lora=lora)


def test_entries_of_the_option_are_names_or_directories():
    config = EngineConfig(model="m", lora=["a=x", "./b=c", "b-2=y=z"])
    assert (config.adapters, config.merged_lora) == ({"a": "x", "b-2": "y=z"}, "./b=c")
    assert EngineConfig(model="m", lora={"a": "x"}).lora == EngineConfig(model="m", lora="a=x").lora == ("a=x",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "lora: got the adapter 'a' of requests with tensor_parallel_size 2"),
        ({"compile_dense": True, "device": "cuda"}, "compile_dense: got true with adapters of requests"),
    ],
)
def test_rejects_options_that_adapters_of_requests_exclude(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineConfig(model="m", lora=["a=x"], **options)
