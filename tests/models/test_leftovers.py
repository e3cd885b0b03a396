"""Tensors that a model has no place for are left out by name, or refused with an example."""

import json
import shutil

import pytest
import torch
from proven_models import proven_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from longspan.errors import ConfigError
from longspan.models.leftovers import leftovers
from longspan.models.loader import load_model


def with_tensors(tmp_path, *names, **fields):
    """Copy the tiny Llama, with more tensors."""
    shutil.copytree(proven_model("llama").path, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(2, 2) for name in names}, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    return str(tmp_path)


def load(path):
    lines = []
    load_model(path, torch.float32, show_progress=False, tell=lines.append)
    return lines


def test_stored_frequencies_load_silently(tmp_path):
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    assert load(with_tensors(tmp_path, *names)) == []


def test_heads_are_left_out_with_one_line(tmp_path):
    names = ["model.layers.3.eh_proj.weight", "mtp.fc.weight", "score.weight", "v_head.summary.weight"]
    path = with_tensors(tmp_path, *names, num_nextn_predict_layers=1)
    (line,) = load(path)
    assert line.startswith(f"{path}: 4 tensors are left out: ")
    assert "heads that predict further tokens (model.layers.3.eh_proj.weight, ...)" in line
    assert "heads of a classifier, reward or value model (score.weight, ...)" in line


def test_rejects_a_prefix_that_fits_nothing(tmp_path):
    path = with_tensors(tmp_path, "vision.a.weight", "vision.b.weight")
    with pytest.raises(
        ConfigError,
        match=r"2 that the config has no place for, such as vision\.a\.weight; all lie under the prefix 'vision\.'",
    ):
        load(path)


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_rejects_a_tensor_without_which_the_output_would_be_wrong(name, tmp_path):
    with pytest.raises(ConfigError, match=f"1 that the config has no place for, such as {name}"):
        load(with_tensors(tmp_path, name))


def test_rejects_a_number_of_further_layers_that_is_none(tmp_path):
    path = with_tensors(tmp_path, "model.layers.3.eh_proj.weight", num_nextn_predict_layers="1")
    with pytest.raises(ConfigError, match="num_nextn_predict_layers: got '1', legal is a whole number from 0"):
        load(path)


def test_a_further_layer_is_a_head_only_where_the_config_counts_it():
    config = LlamaConfig(num_hidden_layers=3, num_nextn_predict_layers=1)
    found = leftovers(
        ["model.layers.3.norm.weight", "model.layers.4.norm.weight", "model.layers.2.norm.weight"], config
    )
    assert list(found.ignored) == ["model.layers.3.norm.weight"]
    assert found.unknown == ["model.layers.4.norm.weight", "model.layers.2.norm.weight"]
    assert leftovers(["model.layers.3.norm.weight"], LlamaConfig(num_hidden_layers=3)).unknown
