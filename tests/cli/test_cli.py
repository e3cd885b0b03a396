"""`longspan generate` does what its help says, and refuses everything else in one line."""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import write_model

from longspan.cgroups import MemoryLimit
from longspan.cli.generate import read_prompt
from longspan.cli.options import as_typed
from longspan.config import EngineConfig
from longspan.engine.memory import kv_cache_memory
from longspan.errors import ConfigError
from longspan.group.host_memory import memory_bytes
from longspan.llm import CompletionOutput, RequestOutput
from longspan.models.recall import recall_path
from longspan.quantities import parse_size
from longspan.types import FinishReason, SamplingParams

FACT = "The magic number is 4711. "
QUESTION = "Once more: The magic number is "
PROMPT = FACT + QUESTION
TEXT = Path(argparse.__file__).read_text()[:3000]
THREADS = ("--executor", "threads")
GENERATE = ("generate", "recall", *THREADS)
SMALL_PAGES = ("--page-size", "4", "--stripe-size", "8")
TWO_RANKS = ("--context-parallel-size", "2", *SMALL_PAGES)
TOKEN_BYTES = 4096
"""Of `recall`'s full attention group and its window group together, per token, float32."""


@pytest.fixture
def recall_copy(cache_home, tmp_path):
    """A copy of the bundled model that a test may spoil."""
    return Path(shutil.copytree(recall_path(), tmp_path / "model"))


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_only_progress(err):
    """On standard error there is nothing but progress, which a slow machine may show, and the line at the end."""
    progress = r"prefill: \d+/\d+ tokens(, \d+ tokens/s, \d+ s left)?|decode: \d+/\d+ tokens(, [\d.]+ tokens/s)?"
    for line in err.splitlines():
        assert re.fullmatch(rf"{progress}|longspan: [\d,]+ prompt tokens .* generated in .*", line), err


def report_of(outcome):
    assert outcome.code == 0, outcome.err
    assert_only_progress(outcome.err)
    assert outcome.out.endswith("}\n")
    assert outcome.out.count("\n") == 1
    return json.loads(outcome.out)


def assert_refused(outcome, *words):
    """Exit code 2, nothing on standard output, one line on standard error that holds all words."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("longspan: ")
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert word in outcome.err or as_typed(word) in outcome.err, word


# -- text and JSON -----------------------------------------------------------------------------------------------------


def test_text_goes_to_standard_output_and_nothing_else(longspan):
    outcome = longspan(*GENERATE, "--prompt", PROMPT, "--max-tokens", "5")
    assert (outcome.code, outcome.out) == (0, "4711.\n")
    assert_only_progress(outcome.err)


def test_json_has_exactly_the_documented_keys(longspan):
    report = report_of(longspan(*GENERATE, "--prompt", PROMPT, "--max-tokens", "5", "--json"))
    assert list(report) == [
        "model",
        "text",
        "token_ids",
        "finish_reason",
        "usage",
        "timing",
        "ranks",
        "strategies",
    ]
    assert report["model"] == "recall"
    assert report["text"] == "4711."
    assert report["token_ids"] == list(b"4711.")
    assert report["finish_reason"] == "length"
    num_prompt_tokens = len(PROMPT) + 1  # and the special token that starts every text
    assert report["usage"] == {"prompt_tokens": num_prompt_tokens, "completion_tokens": 5, "cached_tokens": 0}
    assert list(report["timing"]) == ["load_s", "ttft_s", "tpot_s"]
    assert all(seconds > 0 for seconds in report["timing"].values())
    (rank,) = report["ranks"]
    assert list(rank) == [
        "rank",
        "share",
        "kv_pages_used",
        "kv_pages_total",
        "kv_bytes",
        "tokens_computed",
        "bytes_sent",
        "busy_s",
        "state_slots_used",
        "state_slots_total",
    ]
    assert rank["rank"] == 0
    assert rank["bytes_sent"] == 0
    assert rank["tokens_computed"] == num_prompt_tokens + 5 - 1
    num_pages = -(-(num_prompt_tokens + 5 - 1) // 16)
    assert rank["kv_pages_used"] == 2 * num_pages  # two KV groups
    assert rank["kv_bytes"] == num_pages * 16 * TOKEN_BYTES
    assert rank["kv_pages_total"] >= rank["kv_pages_used"]
    assert report["strategies"] == {"local": 5 * 2}  # (plan, KV group) pairs


def test_one_token_has_no_time_per_further_token(longspan):
    report = report_of(longspan(*GENERATE, "--prompt", PROMPT, "--max-tokens", "1", "--json"))
    assert report["timing"]["tpot_s"] is None


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_compute_every_token_once_and_sum_up(longspan, ranks):
    options = ("--context-parallel-size", str(ranks), *SMALL_PAGES, "--placement", "striped", "--max-tokens", "6")
    report = report_of(longspan(*GENERATE, *options, "--prompt", TEXT + PROMPT, "--json"))
    assert report["text"] == "4711. "
    assert [rank["rank"] for rank in report["ranks"]] == list(range(ranks))
    computed = [rank["tokens_computed"] for rank in report["ranks"]]
    assert sum(computed) == report["usage"]["prompt_tokens"] + 6 - 1
    assert all((rank["bytes_sent"] > 0) == (ranks > 1) for rank in report["ranks"])
    for rank in report["ranks"]:
        num_pages = -(-rank["tokens_computed"] // 4)
        assert rank["kv_bytes"] <= (num_pages + 1) * 4 * TOKEN_BYTES
    assert sum(rank["kv_bytes"] for rank in report["ranks"]) >= sum(computed) * TOKEN_BYTES / 2


@pytest.mark.parametrize("strategy", ["gather_kv", "pass_kv", "pass_q"])
def test_strategy_forces_both_phases(longspan, strategy):
    options = (*TWO_RANKS, "--placement", "striped", "--strategy", strategy, "--max-tokens", "4")
    report = report_of(longspan(*GENERATE, *options, "--prompt", TEXT + PROMPT, "--json"))
    assert report["text"] == "4711"
    assert set(report["strategies"]) <= {strategy, "local"}  # a window may lie on one rank
    assert report["strategies"][strategy] >= 4


def test_decode_strategy_overrides_strategy(longspan):
    options = (*TWO_RANKS, "--placement", "striped", "--strategy", "pass_kv", "--decode-strategy", "pass_q")
    one = report_of(longspan(*GENERATE, *options, "--prompt", TEXT, "--max-tokens", "1", "--json"))["strategies"]
    two = report_of(longspan(*GENERATE, *options, "--prompt", TEXT, "--max-tokens", "3", "--json"))["strategies"]
    assert "pass_q" not in one
    assert one["pass_kv"] == two["pass_kv"]
    assert two["pass_q"] >= 2


@pytest.mark.parametrize("strategy", ["auto", "local", "gather_kv", "pass_kv", "pass_q"])
def test_any_strategy_is_legal_on_one_rank(longspan, strategy):
    options = ("--strategy", strategy, "--placement", "striped", "--max-tokens", "5")
    outcome = longspan(*GENERATE, *options, "--prompt", PROMPT)
    assert (outcome.code, outcome.out) == (0, "4711.\n")


def test_local_means_one_rank_per_request(longspan):
    report = report_of(longspan(*GENERATE, *TWO_RANKS, "--strategy", "local", "--prompt", TEXT, "--json"))
    assert [rank["bytes_sent"] for rank in report["ranks"]] == [0, 0]
    assert sorted(rank["tokens_computed"] > 0 for rank in report["ranks"]) == [False, True]


@pytest.mark.parametrize(
    ("placement", "shares"), [("packed", [False, True]), ("striped", [True, True]), ("spill", [False, True])]
)
def test_placement_says_which_ranks_compute(longspan, placement, shares):
    options = (*TWO_RANKS, "--placement", placement, "--max-tokens", "2")
    report = report_of(longspan(*GENERATE, *options, "--prompt", TEXT, "--json"))
    assert sorted(rank["tokens_computed"] > 0 for rank in report["ranks"]) == shares


def test_spill_continues_on_another_rank_where_packed_is_refused(longspan):
    memory = f"{len(TEXT) // 2 * TOKEN_BYTES + 600 * TOKEN_BYTES}"  # of about 3000 tokens, half and some fit a rank
    options = (*TWO_RANKS, "--kv-cache-memory", memory, "--max-tokens", "5", "--prompt", TEXT + PROMPT, "--json")
    assert_refused(longspan(*GENERATE, *options, "--placement", "packed"), "placement striped or spill")
    report = report_of(longspan(*GENERATE, *options, "--placement", "spill"))
    assert report["text"] == "4711."
    first, second = sorted((rank["tokens_computed"] for rank in report["ranks"]), reverse=True)
    assert first > second > 0


def test_stop_text_ends_the_output_before_it(longspan):
    options = ("--stop", "zzz", "--stop", "1.", "--max-tokens", "50")
    report = report_of(longspan(*GENERATE, *options, "--prompt", PROMPT, "--json"))
    assert (report["text"], report["finish_reason"]) == ("471", "stop")


def test_end_tokens_come_from_generation_config(longspan, recall_copy):
    change_json(recall_copy / "generation_config.json", eos_token_id=[ord("!"), ord(".")])
    options = ("generate", str(recall_copy), *THREADS, "--prompt", PROMPT, "--max-tokens", "9", "--json")
    report = report_of(longspan(*options))
    assert report["finish_reason"] == "stop"
    assert report["token_ids"] == list(b"4711.")
    assert len(report_of(longspan(*options, "--ignore-eos"))["token_ids"]) == 9


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_dtype_sets_the_bytes_of_kv(longspan, dtype):
    report = report_of(longspan(*GENERATE, "--dtype", dtype, "--prompt", PROMPT, "--max-tokens", "5", "--json"))
    assert report["text"] == "4711."
    (rank,) = report["ranks"]
    pages = rank["kv_pages_used"] // 2
    assert rank["kv_bytes"] == pages * 16 * (TOKEN_BYTES // 2 if dtype == "bfloat16" else TOKEN_BYTES)


def test_a_seed_repeats_the_draw_and_another_one_does_not(longspan):
    options = ("--prompt", "qwertz", "--temperature", "50", "--max-tokens", "12", "--json")
    draws = [report_of(longspan(*GENERATE, *options, "--seed", seed))["token_ids"] for seed in "112"]
    assert draws[0] == draws[1] != draws[2]


def test_every_option_arrives(longspan, monkeypatch):
    seen = {}

    class FakeLLM:
        load_s = 1.0
        tokenizer = SimpleNamespace(chat_template=None)

        def __init__(self, model, **options):
            seen["config"] = EngineConfig(model=model, **options)

        def generate(self, text, params, *, lora, on_progress, clamps_max_tokens):
            seen.update(text=text, params=params, lora=lora, clamps=clamps_max_tokens)
            done = CompletionOutput("out", [1], FinishReason.LENGTH, None)
            return [RequestOutput(0, text, [1, 2], [done], None, 1.0, None, 0)]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("longspan.llm.LLM", FakeLLM)
    options = (
        "--prompt=p --max-tokens=7 --min-tokens=3 --temperature=0.5 --top-p=0.25 --top-k=9 --min-p=0.125 --seed=11 "
        "--stop=a --stop=b --ignore-eos --context-parallel-size=3 --threads-per-rank=2 --dtype=bfloat16 "
        "--placement=striped --strategy=pass_kv --decode-strategy=pass_q --page-size=32 --stripe-size=64 "
        "--kv-cache-memory=2MiB --max-num-batched-tokens=99 --attention-backend=reference --executor=threads "
        "--lora=french=/adapters/french --adapter=french"
    )
    assert longspan("generate", "some/model", *options.split()).out == "out\n"
    assert (seen["text"], seen["lora"]) == ("p", "french")
    assert seen["params"] == SamplingParams(
        max_tokens=7,
        min_tokens=3,
        temperature=0.5,
        top_p=0.25,
        top_k=9,
        min_p=0.125,
        seed=11,
        stop=("a", "b"),
        ignore_eos=True,
    )
    assert seen["config"] == EngineConfig(
        model="some/model",
        lora=("french=/adapters/french",),
        context_parallel_size=3,
        threads_per_rank=2,
        dtype="bfloat16",
        placement="striped",
        strategy="pass_kv",
        decode_strategy="pass_q",
        page_size=32,
        stripe_size=64,
        kv_cache_memory=2**21,
        max_num_batched_tokens=99,
        attention_backend="reference",
        executor="threads",
    )
    longspan("generate", "recall", "--prompt", "p")
    assert seen["params"] == SamplingParams(max_tokens=128)
    assert seen["clamps"]  # nobody asked for 128
    assert seen["config"] == EngineConfig(model="recall")
    assert seen["params"].temperature == 0
    assert (seen["config"].context_parallel_size, seen["config"].dtype) == (1, "auto")


def test_threads_default_to_cores_over_ranks(monkeypatch):
    monkeypatch.setattr("longspan.config.num_cores", lambda: 7)
    counts = [EngineConfig(model="recall", context_parallel_size=n).num_threads for n in (1, 2, 7, 8)]
    assert counts == [7, 3, 1, 1]


# -- prompts -----------------------------------------------------------------------------------------------------------

RAW = ["\n\n a \n", "a\r\nb\rc\n", "\ufeffmark", "\0", "é\u2028ü🙂", " "]


@pytest.mark.parametrize("text", RAW)
def test_prompts_are_used_raw_from_every_source(tmp_path, monkeypatch, longspan, text):
    path = tmp_path / "prompt.txt"
    path.write_bytes(text.encode())
    assert read_prompt(None, str(path), None) == text
    num_tokens = len(text.encode()) + 1
    options = ("--max-tokens", "1", "--json")
    sources = [
        lambda: longspan(*GENERATE, *options, "--prompt-file", str(path)),
        lambda: longspan(*GENERATE, *options, "--prompt-file", "-", stdin=text.encode()),
        lambda: longspan(*GENERATE, *options, "-", stdin=text.encode()),
        lambda: longspan(*GENERATE, *options, "--prompt", text),
    ]
    used = sources[RAW.index(text) % 2 :: 2]  # every text comes from a file or an argument, and from standard input
    assert [report_of(source())["usage"]["prompt_tokens"] for source in used] == [num_tokens] * 2


def test_rejects_invalid_utf8_with_its_offset(longspan, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("äb".encode() + b"\xff rest")
    assert_refused(longspan(*GENERATE, "--prompt-file", str(path)), str(path), "byte offset 3", "UTF-8")
    assert_refused(longspan(*GENERATE, "-", stdin=b"abc\xc3"), "standard input", "byte offset 3")
    as_argument = os.fsdecode("äb".encode() + b"\xff")
    assert_refused(longspan(*GENERATE, "--prompt", as_argument), "prompt: not UTF-8", "byte offset 3")


def test_rejects_an_empty_prompt_from_every_source(longspan, tmp_path):
    (tmp_path / "empty").touch()
    for source in (("--prompt", ""), ("--prompt-file", str(tmp_path / "empty")), ("-",)):
        assert_refused(longspan(*GENERATE, *source), "prompt", "empty", "at least one character")


def test_rejects_a_file_that_cannot_be_read(longspan, tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        assert_refused(longspan(*GENERATE, "--prompt-file", str(path)), "prompt-file", str(path), "can be read")


def test_rejects_no_prompt_and_two_prompts(longspan, monkeypatch):
    monkeypatch.setattr("longspan.cli.generate.is_piped", lambda: False)
    legal = "exactly one of --prompt TEXT, --prompt-file FILE, - or a pipe"
    assert_refused(longspan(*GENERATE), "prompt: got none", legal)
    assert_refused(longspan(*GENERATE, "--prompt", "a", "-"), "--prompt and -", "exactly one")
    assert_refused(longspan(*GENERATE, "--prompt", "a", "--prompt-file", "b"), "--prompt and --prompt-file")
    assert_refused(longspan(*GENERATE, "loose words"), "'loose words'", "legal is -")


# -- bad input ---------------------------------------------------------------------------------------------------------

COUNTS = (
    "--max-tokens",
    "--context-parallel-size",
    "--threads-per-rank",
    "--page-size",
    "--stripe-size",
    "--max-num-batched-tokens",
)


@pytest.mark.parametrize("value", ["0", "-3", "99999999999999999999"])
@pytest.mark.parametrize("option", COUNTS)
def test_rejects_counts_that_are_not_positive_or_absurd(longspan, option, value):
    outcome = longspan(*GENERATE, "--prompt", "a", f"{option}={value}")
    name = option.removeprefix("--").replace("-", "_")
    if option == "--max-tokens" and value.startswith("9"):
        assert_refused(outcome, "prompt + max_tokens", value, "legal is at most")
    else:
        assert_refused(outcome, name, value, "legal is a")


REFUSED = [
    (["--temperature", "nan"], ["temperature", "nan", "finite number from 0"]),
    (["--temperature", "inf"], ["temperature", "inf", "finite number from 0"]),
    (["--temperature", "-0.1"], ["temperature", "-0.1", "from 0"]),
    (["--top-p", "0"], ["top_p", "0.0", "above 0 and up to 1"]),
    (["--top-p", "1.5"], ["top_p", "1.5", "up to 1"]),
    (["--top-p", "nan"], ["top_p", "nan", "up to 1"]),
    (["--top-k", "-1"], ["top_k", "-1", "from 0"]),
    (["--min-p", "-0.5"], ["min_p", "-0.5", "from 0 to 1"]),
    (["--min-p", "2"], ["min_p", "2.0", "from 0 to 1"]),
    (["--seed", "-1"], ["seed", "-1", "from 0"]),
    (["--seed", str(2**63)], ["seed", str(2**63), "2**63 - 1"]),
    (["--stop", ""], ["stop", "''", "not empty"]),
    (["--min-tokens", "5", "--max-tokens", "4"], ["min_tokens", "5", "max_tokens (4)"]),
    (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
    (["--placement", "tree"], ["--placement", "tree", "'auto', 'packed', 'striped', 'spill'"]),
    (["--strategy", "ring"], ["--strategy", "ring", "'pass_kv'"]),
    (["--decode-strategy", "ring"], ["--decode-strategy", "ring", "'pass_q'"]),
    (["--max-tokens", "few"], ["--max-tokens", "few", "integer"]),
    (["--temperature", "hot"], ["--temperature", "hot", "float"]),
    (["--kv-cache-memory", "0"], ["kv_cache_memory", "'0'", "positive number of bytes or with K, M, G, Ki, Mi, Gi"]),
    (["--kv-cache-memory", "-1G"], ["kv_cache_memory", "'-1G'", "positive"]),
    (["--kv-cache-memory", "2T"], ["kv_cache_memory", "'2T'", "Gi"]),
    (["--kv-cache-memory", "much"], ["kv_cache_memory", "'much'", "Gi"]),
    (["--kv-cache-memory", "nan"], ["kv_cache_memory", "'nan'", "Gi"]),
    (["--kv-cache-memory", "100"], ["kv_cache_memory", "100", "at least", "one page of 16 tokens"]),
    (["--kv-cache-memory", "999999Gi"], ["kv_cache_memory", str(999999 * 2**30), "at most", "this machine"]),
    (["--context-parallel-size", "129"], ["context_parallel_size", "129", "1 to 128"]),
    (["--page-size", "16", "--stripe-size", "24"], ["stripe_size", "24", "multiple of page_size (16)"]),
    (["--executor", "threads", "--measure", "again"], ["measure", "'again'", "'threads'", "auto or never"]),
    (["--unheard-of", "1"], ["--unheard-of"]),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_rejects_illegal_values(longspan, options, words):
    assert_refused(longspan(*GENERATE, "--prompt", "a", *options), *words)


@pytest.mark.parametrize("placement", ["striped", "spill"])
@pytest.mark.parametrize("option", ["--strategy", "--decode-strategy"])
def test_rejects_local_attention_over_several_ranks(longspan, placement, option):
    outcome = longspan(*GENERATE, "--prompt", "a", *TWO_RANKS, "--placement", placement, option, "local")
    assert_refused(outcome, option[2:].replace("-", "_"), "'local'", repr(placement), "2 ranks", "legal is auto")


def test_rejects_commands_that_do_not_exist(longspan):
    assert_refused(longspan(), "command", "legal is cache, chat, generate, ")
    assert_refused(longspan("compute"), "compute")
    assert_refused(longspan("generate"), "MODEL")


def test_rejects_models_that_are_not_there(longspan, tmp_path):
    for name in (str(tmp_path / "missing"), "./missing", "a/b/c", "missing.gguf", "", " "):
        outcome = longspan("generate", name, *THREADS, "--prompt", "a")
        assert_refused(
            outcome, "model", repr(name), "legal is a model directory, a .gguf file, 'recall', 'smollm2' or a Hub id"
        )
    (tmp_path / "file").touch()
    assert_refused(longspan("generate", str(tmp_path / "file"), "--prompt", "a"), "model", "legal is a model directory")
    assert_refused(longspan("generate", str(tmp_path), "--prompt", "a"), "model", str(tmp_path), "config.json")


def test_rejects_a_hub_id_that_cannot_be_reached(longspan, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = longspan("generate", "nobody/nothing", *THREADS, "--prompt", "a")
    assert_refused(
        outcome,
        "model",
        "'nobody/nothing'",
        "legal is a model directory, a .gguf file, 'recall', 'smollm2' or a Hub id",
    )


def test_rejects_unproven_families_and_rope_types(longspan, recall_copy):
    arguments = ("generate", str(recall_copy), *THREADS, "--prompt", "a")
    config = recall_copy / "config.json"
    whole = config.read_text()
    change_json(config, rope_parameters={"rope_type": "axial", "rope_theta": 1e4})
    assert_refused(longspan(*arguments), "rope_type", "'axial'", "proven is default, dynamic, longrope, linear, llama3")
    config.write_text('{"model_type": "bloom"}')
    assert_refused(longspan(*arguments), "model_type", "'bloom'", "proven is ")
    config.write_text('{"model_type": "never-heard-of"}')
    assert_refused(longspan(*arguments), "model_type", "'never-heard-of'", "proven is ")
    for broken in ("", "{", "[]"):
        config.write_text(broken)
        assert_refused(longspan(*arguments), "model", str(recall_copy), "config")
    config.write_text(whole)
    (recall_copy / "generation_config.json").write_text("{")
    assert_refused(longspan(*arguments), "model", str(recall_copy), "generation config")


def test_rejects_models_with_missing_or_broken_parts(longspan, recall_copy):
    arguments = ("generate", str(recall_copy), *THREADS, "--prompt", "a")
    weights = recall_copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert_refused(longspan(*arguments), "model", str(recall_copy), "weights")
    weights.unlink()
    assert_refused(longspan(*arguments), "model", str(recall_copy), "weights")
    weights.write_bytes(whole)
    (recall_copy / "tokenizer.json").write_text("{")
    assert_refused(longspan(*arguments), "model", str(recall_copy), "tokenizer")


@pytest.mark.parametrize(
    "broken",
    [
        {"tokenizer.json": "{"},
        {"tokenizer.json": "[]"},
        {"tokenizer.json": '{"model": {"type": "NeverHeardOf"}}'},
        {"tokenizer.json": "", "tokenizer_config.json": "{"},
        {"tokenizer_config.json": '{"tokenizer_class": "NoSuchTokenizer", "added_tokens_decoder": {"x": 1}}'},
        {"tokenizer_config.json": "[1]"},
    ],
)
def test_rejects_every_broken_tokenizer_in_one_line(longspan, recall_copy, broken):
    for name, text in broken.items():
        (recall_copy / name).write_text(text)
    outcome = longspan("generate", str(recall_copy), *THREADS, "--prompt", "a")
    assert_refused(outcome, "model", str(recall_copy), "its tokenizer cannot be loaded")


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "qwen2", "llama"])
def test_rejects_models_without_a_tokenizer(longspan, tmp_path, model_type):
    path = write_model(tmp_path / "model", model_type)
    outcome = longspan("generate", path, *THREADS, "--prompt", "Hello there")
    assert_refused(outcome, "model", path, "its tokenizer cannot be loaded")


def test_rejects_attention_that_transformers_passes_over(longspan, recall_copy):
    dual = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    change_json(recall_copy / "config.json", dual_chunk_attention_config=dual)
    outcome = longspan("generate", str(recall_copy), *THREADS, "--prompt", "a")
    assert_refused(outcome, "dual_chunk_attention_config: got {'chunk_size': 262144", "proven is none")


def test_the_error_names_a_prefix_of_all_tensors(longspan, recall_copy):
    file = recall_copy / "model.safetensors"
    save_file({f"language_model.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    outcome = longspan("generate", str(recall_copy), *THREADS, "--prompt", "a")
    assert_refused(outcome, "its tensors begin with 'language_model.', which this model's do not")


# -- too long ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["auto", "packed", "striped", "spill"])
def test_a_request_that_is_too_long_is_told_what_would_fit_it(longspan, placement):
    memory = 128 * TOKEN_BYTES  # about 128 tokens a rank, so a prompt of 301 does not fit two
    options = ["--context-parallel-size", "2", "--page-size", "8", "--stripe-size", "8", "--kv-cache-memory"]
    rest = ["--placement", placement, "--max-tokens", "5", "--prompt", TEXT[:300]]
    outcome = longspan(*GENERATE, *options, str(memory), *rest)
    assert_refused(outcome, "prompt + max_tokens: got 301 + 5 = 306 tokens, legal is at most")
    fits = int(re.search(r"legal is at most (\d+)", outcome.err)[1])
    num_ranks = int(re.search(r"--context-parallel-size of at least (\d+)", outcome.err)[1])
    num_bytes = int(re.search(r"--kv-cache-memory of at least (\d+) bytes per rank", outcome.err)[1])

    assert longspan(*GENERATE, *options, str(num_bytes), *rest).code == 0
    if placement != "packed":  # a packed request is on one rank, whatever their number
        more = [str(num_ranks) if value == "2" else value for value in options]
        assert longspan(*GENERATE, *more, str(memory), *rest).code == 0
    for length, code in ((fits, 0), (fits + 1, 2)):
        prompt = ["--max-tokens", "5", "--prompt", TEXT[: length - 5 - 1]]
        outcome = longspan(*GENERATE, *options, str(memory), "--placement", placement, *prompt)
        assert outcome.code == code, (length, outcome.err)


def test_a_page_that_is_too_large_for_the_memory_is_refused_with_numbers(longspan):
    memory = str(3 * 64 * TOKEN_BYTES)
    options = ["--kv-cache-memory", memory, "--max-tokens", "2", "--prompt", TEXT[: 4 * 64], "--page-size"]
    outcome = longspan(*GENERATE, *options, "128", "--stripe-size", "128")
    assert_refused(outcome, "257 + 2 = 259 tokens", "kv_cache_memory of at least", "context_parallel_size of at least")


def test_rejects_more_tokens_than_the_model_has_positions(longspan, recall_copy):
    change_json(recall_copy / "config.json", max_position_embeddings=64)
    arguments = ("generate", str(recall_copy), *THREADS, "--max-tokens", "4", "--prompt")
    assert longspan(*arguments, "x" * 59).code == 0
    assert_refused(longspan(*arguments, "x" * 60), "61 + 4 = 65", "at most 64", "max_position_embeddings")


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "long", 10**7])
def test_rejects_timeouts_that_never_or_always_pass(value):
    with pytest.raises(ConfigError, match=r"exchange_timeout_s: got .*, legal is a number above 0 and up to"):
        EngineConfig(model="recall", exchange_timeout_s=value)


def test_rejects_a_model_that_is_no_text():
    with pytest.raises(ConfigError, match="model: got 7, legal is a text"):
        EngineConfig(model=7)


def test_what_a_terminal_cannot_show_is_escaped(longspan, monkeypatch):
    class FakeLLM:
        tokenizer = SimpleNamespace(chat_template=None)

        def __init__(self, model, **options):
            pass

        def generate(self, text, params, **_):
            done = CompletionOutput("fish 🐟, \udcff, é", [1], FinishReason.LENGTH, None)
            return [RequestOutput(0, text, [1, 2], [done], None, 1.0, None, 0)]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("longspan.llm.LLM", FakeLLM)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    outcome = longspan("generate", "recall", "--prompt", "p", "--quiet")
    sys.stdout.flush()
    assert (outcome.code, outcome.err) == (0, "")
    assert written.getvalue() == b"fish \\U0001f41f, \\udcff, \xe9\n"


def test_sizes_are_texts_in_python_too():
    assert EngineConfig(model="recall", kv_cache_memory="32Mi").kv_cache_memory == 2**25
    assert EngineConfig(model="recall", context_parallel_size=2, nodes="0,1").nodes == (0, 1)
    with pytest.raises(ConfigError, match="kv_cache_memory: got 'much', legal is a positive number of bytes"):
        EngineConfig(model="recall", kv_cache_memory="much")


def test_memory_is_what_the_container_admits(tmp_path, monkeypatch):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8 kB\nMemAvailable:      900 kB\n")
    monkeypatch.setattr("longspan.group.host_memory.memory_limits", lambda root: [])
    total, free = memory_bytes(tmp_path)
    assert (total, free) == (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 900 * 1024)
    limits = [MemoryLimit(600_000, 170_000), MemoryLimit(700_000, 50_000)]
    monkeypatch.setattr("longspan.group.host_memory.memory_limits", lambda root: limits)
    assert memory_bytes(tmp_path) == (600_000, 50_000)


def test_kv_memory_defaults_to_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr("longspan.engine.memory.memory_bytes", lambda: (1000, 800))
    assert kv_cache_memory(None, 2) == 200
    assert kv_cache_memory(500, 2) == 500
    with pytest.raises(ConfigError, match="kv_cache_memory: got 501 bytes per rank, legal is at most 500"):
        kv_cache_memory(501, 2)
    monkeypatch.setattr("longspan.engine.memory.memory_bytes", lambda: (2**50, 2**49))
    assert kv_cache_memory(None, 2) == 4 * 2**30


# -- sizes and time ----------------------------------------------------------------------------------------------------


def test_sizes_are_bytes_or_have_a_unit():
    cases = {
        "1": 1,
        "2K": 2000,
        "2k": 2000,
        "2Ki": 2048,
        "3M": 3 * 10**6,
        "3MiB": 3 * 2**20,
        "1.5G": 15 * 10**8,
        "4GB": 4 * 10**9,
        " 4 Gi ": 4 * 2**30,
        "9007199254740993": 2**53 + 1,
    }
    assert {text: parse_size(text) for text in cases} == cases


@pytest.mark.parametrize("text", ["", "0", "0.4", "-1", "1T", "1e9", "KiB", "1 2", "inf", "1KK"])
def test_rejects_sizes_that_are_not_positive_bytes(text):
    with pytest.raises(ConfigError, match=r"field: got .* legal is a positive number of bytes or with K, M, G"):
        parse_size(text, "field")


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_installed_command_streams_a_pipe_through_two_worker_processes(cache_home):
    command = [sys.executable, "-m", "longspan", "generate", "recall", *TWO_RANKS, "--placement", "striped"]
    done = subprocess.run(
        [*command, "--max-tokens", "4", "--json", "-"],
        input=(TEXT + PROMPT).encode(),
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one object and nothing else, whatever the libraries have to say
    assert report["text"] == "4711"
    assert sum(rank["tokens_computed"] for rank in report["ranks"]) == report["usage"]["prompt_tokens"] + 3
    assert all(rank["bytes_sent"] > 0 for rank in report["ranks"])
    assert_only_progress(done.stderr.decode())


@pytest.mark.processes
def test_what_a_worker_refuses_exits_with_2(recall_copy):
    weights = recall_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    command = [sys.executable, "-m", "longspan", "generate", str(recall_copy), "--prompt", "a"]
    done = subprocess.run([*command, *TWO_RANKS], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"longspan: model: got {str(recall_copy)!r}")


@pytest.mark.processes
def test_a_hub_that_does_not_answer_is_asked_once(cache_home):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there
    command = [sys.executable, "-m", "longspan", "generate", "nobody/nothing", "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "nobody/nothing" in done.stderr
