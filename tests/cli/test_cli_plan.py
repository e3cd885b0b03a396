"""`longspan plan` answers for well-known models, says what it assumes, and refuses everything else in one line."""

import json
import re

import pytest
from click.testing import CliRunner
from planned import (
    LLAMA_3_8B,
    LLAMA_3_8B_WEIGHTS,
    LLAMA_3_405B,
    LLAMA_3_405B_WEIGHTS,
    make_cluster,
    make_shape,
    write_config,
)

from longspan.cli.main import cli
from longspan.cli.pictures import check_plot
from longspan.cli.plan_text import print_plan
from longspan.costmodel.gpus import GPUS
from longspan.costmodel.model_time import StepOptions, decode_bytes, prefill_flops
from longspan.errors import ConfigError
from longspan.models.shape import load_shape
from longspan.planner.memory_fit import request_kv_bytes
from longspan.planner.report import make_plan
from longspan.types import ExpertWeights

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
LLAMA_4_SCOUT = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "attention_chunk_size": 8192,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "num_attention_heads": 40,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "vocab_size": 202048,
    },
    "vision_config": {"model_type": "llama4_vision_model"},
}
GEMMA_3_27B = {
    "model_type": "gemma3",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model"},
}
NOT_RUN = LLAMA_3_8B | {"model_type": "beam", "num_hidden_layers": 2}


@pytest.fixture
def llama(tmp_path):
    """A config file of Llama 3 8B; no weights beside it."""
    return write_config(tmp_path, LLAMA_3_8B)


@pytest.fixture
def plan(cache_home, monkeypatch):
    """`plan(*arguments)` returns what it printed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments):
        return CliRunner().invoke(cli, ["plan", *arguments], catch_exceptions=False).output

    return run


def refused(*arguments):
    """The message of a refusal, which is one line."""
    with pytest.raises(ConfigError) as error:
        CliRunner().invoke(cli, ["plan", *arguments], catch_exceptions=False)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "num_weights", "kv_token_bytes"),
    [(LLAMA_3_8B, LLAMA_3_8B_WEIGHTS, 131_072), (LLAMA_3_405B, LLAMA_3_405B_WEIGHTS, 516_096)],
)
def test_well_known_models_have_their_well_known_sizes(tmp_path, config, num_weights, kv_token_bytes):
    shape = load_shape(write_config(tmp_path, config), "bfloat16")
    assert shape.num_weights == num_weights
    assert shape.kv_token_bytes == kv_token_bytes
    assert shape.num_logit_weights == 128256 * config["hidden_size"]
    assert shape.num_weights == shape.spec.num_parameters + 2 * shape.num_logit_weights
    assert (shape.hidden_size, shape.intermediate_size) == (config["hidden_size"], config["intermediate_size"])
    assert shape.not_run is None


def test_tied_weights_are_held_once_and_read_for_logits(tmp_path):
    shape = load_shape(write_config(tmp_path, LLAMA_3_8B | {"tie_word_embeddings": True}), "bfloat16")
    assert shape.num_weights == LLAMA_3_8B_WEIGHTS - 128256 * 4096
    assert shape.num_logit_weights == 128256 * 4096


def test_a_mixture_of_experts_holds_all_weights_and_reads_those_that_its_tokens_meet(tmp_path):
    shape = load_shape(write_config(tmp_path, QWEN3_30B_A3B), "bfloat16")
    embeddings, expert = 2 * 151936 * 2048, 3 * 2048 * 768
    layer = 2048 * 128 * (32 + 4 + 4) + 128 * 32 * 2048 + 128 * 2048 + 2 * 2048 + 2 * 128  # attention, router, norms
    assert shape.num_weights == embeddings + 48 * (layer + 128 * expert) + 2048
    assert round(shape.num_weights / 1e9, 1) == 30.5
    assert shape.spec.experts == ExpertWeights(48 * 128 * expert, 128, 8)
    assert shape.spec.active_parameters == 48 * (layer + 8 * expert) + 2048
    assert shape.spec.parameters_read(3) == 48 * (layer + 24 * expert) + 2048
    assert shape.spec.parameters_read(17) == shape.spec.num_parameters
    assert shape.intermediate_size == 8 * 768
    assert shape.divided(4).spec.active_parameters == pytest.approx(shape.spec.active_parameters / 4)
    assert shape.not_run is None


def test_chunks_take_no_more_memory_than_a_chunk_and_a_step(tmp_path):
    shape = load_shape(write_config(tmp_path, LLAMA_4_SCOUT), "bfloat16")
    embeddings, expert, attention = 2 * 202048 * 5120, 3 * 5120 * 8192, 5120 * 128 * (40 + 8 + 8 + 40)
    layer = attention + 5120 * 16 + 2 * 5120 + expert  # the shared expert
    assert shape.num_weights == embeddings + 48 * (layer + 16 * expert) + 5120
    assert shape.spec.experts == ExpertWeights(48 * 16 * expert, 16, 1)
    assert shape.spec.max_position == 10485760
    assert shape.not_run is None
    assert {group.spec.chunk: len(group.layers) for group in shape.spec.kv_groups} == {8192: 36, None: 12}
    options, million, layer_bytes = StepOptions(), 2**20, 2 * 8 * 128 * 2
    held = request_kv_bytes(shape, million, 1, options)
    assert held == layer_bytes * (12 * million + 36 * (8192 + options.max_num_batched_tokens + 2 * options.page_size))
    pairs = 12 * million * (million + 1) / 2 + 36 * (million / 8192) * 8192 * 8193 / 2 - million * (million + 1) / 2
    weights = shape.spec.active_parameters - shape.unread_weights()
    assert prefill_flops(shape, million) == pytest.approx(
        2 * weights * million + 2 * shape.num_logit_weights + pairs * 2 * 40 * 256, rel=1e-12
    )
    read = shape.spec.active_parameters + shape.num_logit_weights
    assert decode_bytes(shape, million + 99) == 2 * read + layer_bytes * (12 * (million + 100) + 36 * 100)


def test_a_million_tokens_of_llama_4_are_planned(plan, tmp_path):
    text = plan(write_config(tmp_path, LLAMA_4_SCOUT), "--gpu", "h200", "--context", "1M")
    assert "108 G weights in bfloat16" in text
    assert "the model's config admits 10,485,760 tokens" in text
    assert "1M " in text
    assert "(!)" not in text


@pytest.mark.cover
def test_the_text_part_of_a_multimodal_model_is_planned(plan, tmp_path):
    shape = load_shape(write_config(tmp_path, GEMMA_3_27B), "bfloat16")
    assert round(shape.num_weights / 1e9, 1) == 27.0
    assert {group.spec.window: len(group.layers) for group in shape.spec.kv_groups} == {1024: 52, None: 10}
    assert shape.not_run is None
    assert "27 G weights" in plan(write_config(tmp_path, GEMMA_3_27B), "--gpu", "h200", "--context", "128k")


def test_overrides_stand_in_place_of_the_files_fields(plan, tmp_path):
    overrides = {"text_config": {"num_hidden_layers": 6}}
    shape = load_shape(write_config(tmp_path, GEMMA_3_27B), "bfloat16", overrides)
    assert shape.spec.num_layers == 6
    text = plan(write_config(tmp_path, GEMMA_3_27B), "--gpu", "h200", "--hf-overrides", json.dumps(overrides))
    assert "3.89 G weights" in text


def test_a_directory_and_a_file_of_any_name_are_the_same_model(tmp_path):
    by_directory = load_shape(str(tmp_path) if write_config(tmp_path, LLAMA_3_8B) else "", "float32")
    assert by_directory == load_shape(write_config(tmp_path, LLAMA_3_8B, "llama.json"), "float32")


def test_quantised_weights_are_planned_as_they_are_loaded(tmp_path):
    quantised = LLAMA_3_8B | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    paths = [write_config(tmp_path, config, f"{name}.json") for name, config in (("a", quantised), ("b", LLAMA_3_8B))]
    found, dense = (load_shape(path, "bfloat16") for path in paths)
    assert found == dense
    unread = write_config(tmp_path, LLAMA_3_8B | {"quantization_config": {"quant_method": "hqq"}}, "c.json")
    assert "got quant_method 'hqq'" in load_shape(unread, "bfloat16").not_run


def test_latent_attention_is_planned_with_what_it_stores(tmp_path):
    """DeepSeek V2 Lite: 27 layers of 512 + 64 elements in bfloat16, of 16 heads of 192 and 128."""
    config = {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "q_lora_rank": None,
        "vocab_size": 102400,
    }
    shape = load_shape(write_config(tmp_path, config), "bfloat16")
    assert shape.kv_token_bytes == 27 * 576 * 2 == 31_104
    assert shape.num_weights == pytest.approx(15.7e9, rel=0.01)
    assert shape.spec.active_parameters == pytest.approx(2.25e9, rel=0.03)
    assert shape.not_run is None
    assert shape.divided(4).kv_token_bytes == 31_104, "every device of a rank holds the one latent"


@pytest.mark.cover
def test_states_of_recurrent_layers_are_counted_beside_kv(tmp_path):
    """A quarter of Qwen3-Next: 9 layers of 32 heads of 128 x 128 in float32, and 8192 channels of four inputs; 3 of
    attention."""
    config = {"model_type": "qwen3_next", "num_hidden_layers": 12}
    shape = load_shape(write_config(tmp_path, config), "bfloat16")
    assert shape.not_run is None
    assert shape.kv_token_bytes == 3 * 2 * 256 * 2 * 2 == 24_576 // 4
    assert shape.spec.state_bytes == 9 * (32 * 128 * 128 * 4 + 8192 * 4 * 2) == 77_856_768 // 4
    with pytest.raises(ConfigError, match="tensor_parallel_size: got 2 for a model with recurrent layers"):
        shape.divided(2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA_3_8B | {"kv_lora_rank": 512}, "kv_lora_rank: got 512, plannable is"),
        (
            {"model_type": "deepseek_v32"},
            "index_topk: got 2048, plannable is a model without it: sparse attention reads",
        ),
        (
            {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2},
            "this model cannot be planned: num_hidden",
        ),
        ({"model_type": "t5", "vocab_size": 100}, "plannable"),
        ({"model_type": "nobody-knows"}, "its config cannot be loaded"),
    ],
)
def test_rejects_models_for_which_the_numbers_would_be_wrong(tmp_path, config, message):
    with pytest.raises(ConfigError) as error:
        load_shape(write_config(tmp_path, config), "bfloat16")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# -- output ------------------------------------------------------------------------------------------------------------


def test_text_says_what_is_assumed_what_fits_and_how_long_it_takes(plan, llama):
    text = plan(llama, "--gpu", "h200")
    for words in (
        "8.03 G weights in bfloat16",
        "1 node of 8 x H200 SXM, 141 GB each",
        "8 of 1 device; placement striped",
        "chunks of 16,384 tokens, 2,048 or less per rank",
        "assumed: 70% (matmul) and 60% (attention) of 989 TFLOP/s, 80% of 4.8 TB/s memory",
        "16.1 GB weights",
        "14.1 GB kept back (10 %)",
        "131 kB per token; 6,765,056 tokens fit in all; longest request 6,765,057",
        "the model's config admits 131,072 tokens",
        "1M: longer than the 131,072 positions",
        "Rates are assumed shares of published figures. No GPU has run the engine yet.",
    ):
        assert words in text
    table = [line.split("  ") for line in text.splitlines() if line.startswith(("8k ", "128k ", "1M (!) "))]
    assert len(table) == 3
    assert "tensor parallelism" not in text
    assert "CPU" not in text  # the engine takes GPUs, which are untried


def test_a_terminal_gets_a_table(capsys):
    report = make_plan(make_shape(), make_cluster(16), [8192, 10**9], model="made")
    print_plan(report, is_terminal=True)
    text = capsys.readouterr().out
    assert "does not" in text
    assert "\u2502" in text or "|" in text
    assert "2 nodes of 8 x H100 SXM" in text


def test_json_holds_everything(plan, llama):
    report = json.loads(plan(llama, "--gpu", "h100", "--nodes", "2", "--context", "1M,8k", "--json"))
    assert [one["context_len"] for one in report["contexts"]] == [8192, 1048576]
    assert (report["num_devices"], report["num_ranks"], report["tensor_parallel_size"]) == (16, 16, 1)
    assert report["num_weights"] == LLAMA_3_8B_WEIGHTS
    assert report["cluster"]["assumptions"]["matmul_efficiency"] == 0.7
    for one in report["contexts"]:
        assert one["fits"]
        assert one["exceeds_model"] == (one["context_len"] == 1048576)
        assert one["prefill"]["total_s"] > one["prefill_floor_s"] > 0
        assert one["decode"]["dense_s"] + one["decode"]["attention_s"] > one["decode_floor_s"] > 0


@pytest.mark.cover
def test_what_does_not_fit_is_an_answer_and_not_a_failure(cache_home, tmp_path):
    path = write_config(tmp_path, LLAMA_3_405B)
    outcome = CliRunner().invoke(
        cli, ["plan", path, "--gpu", "h100", "--nodes", "2", "--tensor-parallel-size", "4", "--context", "128k"]
    )
    assert outcome.exit_code == 0
    assert "no room for KV: 72 GB are usable" in outcome.output
    assert "128k does not fit: needed per device are 203 GB of weights and 4.23 GB of KV, usable are 72 GB" in (
        outcome.output
    )
    assert "what would fit it: devices with 2" in outcome.output
    assert "128k     does not fit" in outcome.output
    assert "Sums inside a rank are modelled; the engine has not run them on GPUs." in outcome.output


def test_a_larger_cluster_is_named_where_one_would_do(plan, llama):
    text = plan(llama, "--gpu", "l4", "--gpus-per-node", "2", "--context", "1M")
    assert "1M does not fit: " in text
    assert "what would fit it: " in text
    assert "nodes; or devices with" in text


def test_a_family_that_the_engine_does_not_run_is_planned_and_said_so(plan, tmp_path):
    text = plan(write_config(tmp_path, NOT_RUN), "--gpu", "l4", "--context", "8k")
    assert "The engine does not run this model yet (model_type: got 'beam', proven is afmoe" in text


def test_the_bundled_model_is_planned_with_its_windows(plan):
    report = json.loads(plan("recall", "--gpu", "l4", "--dtype", "float32", "--context", "64k", "--json"))
    assert len(report["contexts"][0]["decode"]["strategies"]) == 2
    assert report["max_position"] == 2**21


def test_memory_replaces_what_the_cluster_says(plan, llama):
    small, large = (
        json.loads(plan(llama, "--gpu", "l4", "--context", "8k", "--memory", memory, "--json"))["fit"]
        for memory in ("20GB", "24GB")
    )
    assert small["usable_bytes"] == pytest.approx(0.9 * 20e9)
    assert small["num_tokens"] < large["num_tokens"]


def test_measured_rates_come_from_a_file_in_their_own_dtype(plan, llama, tmp_path):
    from hardware import MEASURED

    path = tmp_path / "measured.json"
    path.write_text(json.dumps(MEASURED | {"memory_bytes": "64GiB"}))
    report = json.loads(plan(llama, "--cluster", str(path), "--context", "2k", "--json"))
    assert (report["dtype"], report["num_ranks"]) == ("float32", 4)
    text = plan(llama, "--cluster", str(path), "--context", "2k")
    assert "measured: matmul 80 GFLOP/s, memory 10 GB/s, links in a node 2 GB/s, links between nodes 100 MB/s" in text
    assert "assumed shares" not in text


@pytest.mark.cover
def test_a_picture_is_a_png(plan, llama, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    plan(llama, "--gpu", "h100", "--context", "8k,64M", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "cluster: got none of --gpu and --cluster, legal is exactly one; known GPUs are a10, "),
        (("--gpu", "h100", "--cluster", "x.yaml"), "cluster: got both of --gpu and --cluster"),
        (("--cluster", "x.yaml", "--nodes", "2"), "--nodes: got 2 with --cluster"),
        (("--cluster", "x.yaml", "--gpus-per-node", "2"), "--gpus-per-node: got 2 with --cluster"),
        (("--cluster", "missing.yaml"), "cluster: got 'missing.yaml', legal is a file that can be read"),
        (("--gpu", "gtx"), "gpu: got 'gtx', legal is one of a10"),
        (("--gpu", "h100", "--nodes", "0"), "nodes: got 0"),
        (("--gpu", "h100", "--context", "8k,x"), "context: got 'x'"),
        (("--gpu", "h100", "--context", ""), "context: got ''"),
        (("--gpu", "h100", "--context", "8k,8192"), "context: got '8k,8192' with a length twice"),
        (("--gpu", "h100", "--memory", "none"), "memory: got 'none'"),
        (("--gpu", "h100", "--memory-utilization", "2"), "memory_utilization: got 2.0"),
        (("--gpu", "h100", "--tensor-parallel-size", "3"), "tensor_parallel_size: got 3 with 8 devices per node"),
        (("--gpu", "h100", "--nodes", "20"), "nodes: got 20 with 8 devices per node"),
        (("--gpu", "h100", "--plot", "x.pdf"), "plot: got 'x.pdf', legal is a file name that ends in .png"),
        (("--gpu", "h100", "--plot", "/nowhere/x.png"), "plot: got '/nowhere/x.png', legal is a file in a directory"),
    ],
)
def test_rejects_options_in_one_line(llama, arguments, message):
    assert message in refused(llama, *arguments)


def test_rejects_a_model_that_is_not_there(cache_home, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert refused("./nothing", "--gpu", "h100").startswith("model: got './nothing', legal is")


def test_rejects_a_picture_that_cannot_be_written(llama, tmp_path):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(ConfigError, match=r"^plot: got '.*taken.png', legal is a file that can be written"):
        check_plot(str(tmp_path / "taken.png"))


def test_rejects_a_picture_without_matplotlib_and_names_the_extra(llama, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert "longspan[plot]" in refused(llama, "--gpu", "h100", "--plot", "x.png")


def test_the_command_exits_with_2_for_bad_input(longspan, tmp_path):
    outcome = longspan("plan", write_config(tmp_path, LLAMA_3_8B), "--gpu", "gtx")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("longspan: gpu: got 'gtx'")


def test_help_lists_the_known_gpus_and_a_short_name_means_the_usual_product(llama):
    text = CliRunner().invoke(cli, ["plan", "--help"]).output
    for name in (*GPUS, "a100"):
        assert re.search(rf"[ ,]{name}[,.]", text), name
    short, whole = (
        CliRunner().invoke(cli, ["plan", llama, "--gpu", name, "--context", "1k"]) for name in ("A100", "a100-80g")
    )
    assert short.exit_code == 0
    assert short.output == whole.output
