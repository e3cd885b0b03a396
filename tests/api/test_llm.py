"""The Python API: shapes of prompts and outputs, text, refusals, and models that cannot be loaded."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import run_all, tiny_model, write_model
from transformers import AutoConfig

from longspan import LLM, ConfigError, LongspanError, SamplingParams
from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.errors import CapacityError, UnsupportedModelError
from longspan.models.recall_tokenizer import BOS_ID, EOS_ID
from longspan.types import FinishReason

TEXT = Path(argparse.__file__).read_text()[:600]
FACT = "The answer to everything is "
THREADS = {"executor": "threads", "threads_per_rank": 1, "kv_cache_memory": 2**25}


@pytest.fixture(scope="module")
def llm(cache_home):
    with LLM(
        "recall", context_parallel_size=2, placement="striped", page_size=16, stripe_size=64, **THREADS
    ) as running:
        yield running


def prompt_for(answer):
    """A text after which the model says `answer`, and goes on with a newline."""
    return f"{FACT}{answer}\n{TEXT}\n{FACT}"


def text_of(output):
    return output.outputs[0].text


# ------------------------------------------------------------------------------------------------ prompts and outputs


def test_a_prompt_may_be_text_ids_or_a_dictionary_alone_or_in_a_list(llm):
    text = prompt_for("42.")
    ids = [BOS_ID, *text.encode()]
    params = SamplingParams(max_tokens=4)
    for prompt in (text, ids, tuple(ids), {"prompt": text}, {"prompt_token_ids": ids}):
        for prompts in (prompt, [prompt]):
            (output,) = llm.generate(prompts, params)
            assert text_of(output) == "42.\n"
            assert output.outputs[0].token_ids == list(b"42.\n")
            assert output.prompt_token_ids == ids
            is_text = isinstance(prompt, str) or "prompt" in prompt
            assert output.prompt == (text if is_text else None)


def test_outputs_come_in_the_order_of_the_prompts_whatever_ends_first(llm):
    answers = ["first", "2", "number three", "4", "fifth"]
    params = [SamplingParams(max_tokens=len(answer)) for answer in answers]
    outputs = llm.generate([prompt_for(answer) for answer in answers], params)
    assert [text_of(output) for output in outputs] == answers
    assert len({output.request_id for output in outputs}) == 5


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([]) == []


def test_an_output_says_why_it_ended_and_how_long_it_took(llm):
    (output,) = llm.generate(prompt_for("one two"), SamplingParams(max_tokens=7))
    completion = output.outputs[0]
    assert (completion.finish_reason, completion.index) == (FinishReason.LENGTH, 0)
    assert completion.logprobs is None
    assert output.prompt_logprobs is None
    assert 0 < output.ttft_s < 60
    assert 0 < output.tpot_s < 60
    (single,) = llm.generate(prompt_for("one two"), SamplingParams(max_tokens=1))
    assert single.tpot_s is None


def test_logprobs_have_one_entry_per_token(llm):
    (output,) = llm.generate(
        prompt_for("42."), [SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=0, temperature=0.5, seed=1)]
    )
    completion = output.outputs[0]
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    assert all(len(entry.top) == 2 for entry in completion.logprobs)
    first, *others = output.prompt_logprobs
    assert first is None
    assert [entry.token_id for entry in others] == output.prompt_token_ids[1:]


def test_progress_is_told_for_every_request_and_never_goes_back(llm):
    seen = {0: [], 1: []}
    prompts = [prompt_for("a"), prompt_for("b") * 3]
    llm.generate(
        prompts, SamplingParams(max_tokens=3), on_progress=lambda progress: seen[progress.request_idx].append(progress)
    )
    for index, steps in seen.items():
        assert {step.prompt_tokens for step in steps} == {1 + len(prompts[index])}
        computed = [(step.prefilled_tokens, step.generated_tokens, step.elapsed_s) for step in steps]
        assert computed == sorted(computed)
        assert computed[-1][:2] == (1 + len(prompts[index]), 3)


def test_a_callback_that_raises_leaves_an_llm_that_works(llm):
    def fail(progress):
        raise RuntimeError("not today")

    with pytest.raises(RuntimeError, match="not today"):
        llm.generate([prompt_for("a"), prompt_for("b")], SamplingParams(max_tokens=50), on_progress=fail)
    assert text_of(llm.generate(prompt_for("42."), SamplingParams(max_tokens=3))[0]) == "42."
    llm.engine.scheduler.memory.check_integrity()
    assert llm.engine.scheduler.memory.is_empty


def test_close_may_be_called_twice_and_ends_the_llm(cache_home):
    llm = LLM("recall", **THREADS)
    llm.close()
    llm.close()
    with pytest.raises(LongspanError, match="closed"):
        llm.generate("a")


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("answer", ["naïve café", "price 5 € or 6 £", "👩‍🚀👍🏽", "日本語テキスト", "a\u0301\ufffd!"])
def test_characters_that_several_tokens_make_come_out_whole(llm, answer):
    (output,) = llm.generate(prompt_for(answer), SamplingParams(max_tokens=200, stop="\n"))
    assert text_of(output) == answer
    assert output.outputs[0].finish_reason is FinishReason.STOP


def test_a_character_that_is_cut_off_shows_as_a_replacement(llm):
    (output,) = llm.generate(prompt_for("5 €"), SamplingParams(max_tokens=4))
    assert output.outputs[0].token_ids == [*b"5 ", *"€".encode()[:2]]
    assert text_of(output) == "5 \ufffd"


def test_a_stop_string_may_start_in_one_token_and_end_in_a_later_one(llm):
    (output,) = llm.generate(prompt_for("apples STOP pears"), SamplingParams(max_tokens=50, stop=["nothing", "STOP"]))
    assert text_of(output) == "apples "
    assert output.outputs[0].token_ids == list(b"apples STOP")
    assert output.outputs[0].finish_reason is FinishReason.STOP


def test_a_token_behind_a_stop_string_does_not_count_however_many_plans_have_ended(llm, monkeypatch):
    num_together = []
    take_in = llm.engine.take_in

    def take_in_together(done):
        for future in llm.engine.in_flight:
            future.result(timeout=20)
        done = llm.engine.in_flight.ended()
        num_together.append(len(done))
        return take_in(done)

    monkeypatch.setattr(llm.engine, "take_in", take_in_together)
    for fruit in ("apples", "pears", "a fig"):
        params = SamplingParams(max_tokens=50, stop="STOP", logprobs=0)
        (output,) = llm.generate(prompt_for(f"{fruit} STOP and no more"), params)
        completion = output.outputs[0]
        assert (completion.text, completion.finish_reason) == (f"{fruit} ", FinishReason.STOP)
        assert bytes(completion.token_ids) == f"{fruit} STOP".encode()
        assert [one.token_id for one in completion.logprobs] == completion.token_ids
    assert num_together.count(2) > 5, "plans never stood behind each other"


def test_the_first_of_several_stop_strings_counts(llm):
    (output,) = llm.generate(prompt_for("a bc d"), SamplingParams(max_tokens=6, stop=("bc", "c", "d")))
    assert text_of(output) == "a "
    assert output.outputs[0].token_ids == list(b"a bc")


def test_a_stop_string_as_the_last_allowed_token_ends_with_stop(llm):
    (output,) = llm.generate(prompt_for("ab"), SamplingParams(max_tokens=2, stop="b"))
    assert (text_of(output), output.outputs[0].finish_reason) == ("a", FinishReason.STOP)


def test_a_stop_string_in_the_prompt_does_not_count(llm):
    (output,) = llm.generate(prompt_for("42."), SamplingParams(max_tokens=3, stop=["is ", "s 4", "TEXT"]))
    assert text_of(output) == "42."


def test_stop_strings_do_not_count_before_min_tokens(llm):
    prompt = prompt_for("x, y, z, end")
    for min_tokens, expected in ((0, "x"), (1, "x"), (2, "x, y"), (4, "x, y"), (5, "x, y, z"), (12, "x, y, z, end")):
        params = SamplingParams(max_tokens=12, min_tokens=min_tokens, stop=",")
        assert text_of(llm.generate(prompt, params)[0]) == expected


def test_an_end_token_ends_the_text_and_is_not_in_it(llm):
    ids = [BOS_ID, *b"the needle is here: yes", EOS_ID, *TEXT.encode(), *b"the needle is here: "]
    (output,) = llm.generate(ids, SamplingParams(max_tokens=20))
    completion = output.outputs[0]
    assert completion.token_ids == [*b"yes", EOS_ID]
    assert (completion.text, completion.finish_reason) == ("yes", FinishReason.STOP)
    (ignoring,) = llm.generate(ids, SamplingParams(max_tokens=20, ignore_eos=True))
    assert ignoring.outputs[0].text == "yes" + TEXT[:16]
    (stopped,) = llm.generate(ids, SamplingParams(max_tokens=20, stop_token_ids=[ord("s")]))
    assert (stopped.outputs[0].text, stopped.outputs[0].token_ids) == ("ye", list(b"yes"))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "prompt: got an empty text, legal is at least one character"),
        ([], "prompt: got no tokens, legal is at least one"),
        ("\ud800", "prompt: got a lone surrogate at character 0, legal is valid Unicode"),
        ([260], "token id: got 260, legal is 0 to 259"),
        ([-1], "token id: got -1, legal is 0 to 259"),
        ([True], "prompt: got list, legal is text or a list of token ids"),
        ([1.0], "prompt: got list, legal is text or a list of token ids"),
        (5, "prompt: got int, legal is text or a list of token ids"),
        (b"abc", "prompt: got bytes, legal is text or a list of token ids"),
        ({"prompt": 5}, "prompt: got int, legal is text"),
        ({"prompt": [1, 2]}, "prompt: got list, legal is text"),
        ({"prompt_token_ids": "ab"}, "prompt_token_ids: got str, legal is a list"),
        ({"text": "a"}, "prompt: got the keys ['text'], legal is 'prompt' or 'prompt_token_ids'"),
        (
            {"prompt": "a", "prompt_token_ids": [1]},
            "prompt: got the keys ['prompt', 'prompt_token_ids'], legal is 'prompt' or 'prompt_token_ids'",
        ),
    ],
    ids=repr,
)
def test_rejects_a_batch_with_one_bad_prompt_and_runs_nothing(llm, bad, message):
    before = [stats.tokens_computed for stats in llm.rank_stats()]
    with pytest.raises(ConfigError) as caught:
        llm.generate(["good", bad, "good too"])
    assert str(caught.value) == message
    assert [stats.tokens_computed for stats in llm.rank_stats()] == before
    assert not llm.engine.has_requests


def test_an_llm_works_after_a_refusal(llm):
    with pytest.raises(ConfigError):
        llm.generate(["good", ""])
    assert text_of(llm.generate(prompt_for("42."), SamplingParams(max_tokens=3))[0]) == "42."


@pytest.mark.parametrize("prompts", [5, None, b"abc", 1.5])
def test_rejects_prompts_that_are_no_prompts(llm, prompts):
    with pytest.raises(ConfigError, match=r"prompts: got \w+, legal is one prompt or a list of prompts"):
        llm.generate(prompts)


@pytest.mark.parametrize("params", [{"max_tokens": 5}, "greedy", 5, [None], [{"max_tokens": 5}]])
def test_rejects_sampling_parameters_of_another_type(llm, params):
    with pytest.raises(ConfigError, match=r"sampling_params: got \w+, legal is a SamplingParams or a list"):
        llm.generate("a", params)


def test_rejects_another_number_of_parameters_than_prompts(llm):
    with pytest.raises(ConfigError, match="sampling_params: got 2 for 3 prompts, legal is one, or one each"):
        llm.generate(["a", "b", "c"], [SamplingParams()] * 2)


def test_rejects_a_request_that_does_not_fit_and_says_what_would(llm):
    with pytest.raises(CapacityError, match=r"prompt \+ max_tokens: got 3 \+ 100000 = 100003 tokens, legal is at most"):
        llm.generate(["ab", "fits"], SamplingParams(max_tokens=100_000))
    assert not llm.engine.has_requests


def test_rejects_unknown_and_illegal_options():
    with pytest.raises(ConfigError, match="option: got 'pipeline_parallel_size', legal is one of device, dtype, "):
        LLM("recall", pipeline_parallel_size=2)
    with pytest.raises(ConfigError, match="page_size: got 0, legal is"):
        LLM("recall", page_size=0)


# ------------------------------------------------------------------------------------------------ models


def write_config(path, model_type, **options):
    """A model directory without weights: whatever is refused is refused before they are missed."""
    AutoConfig.for_model(model_type, **options).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("bloom", {}, "model_type: got 'bloom', proven is "),
        ("falcon", {}, "model_type: got 'falcon', proven is "),
        (
            "llama",
            {"rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0}},
            "rope_type: got 'axial', proven is default, dynamic, longrope, linear, llama3, proportional, yarn",
        ),
        (
            "qwen2",
            {"quantization_config": {"quant_method": "gptq", "bits": 3}},
            "quantization_config: got bits 3, proven is 4, 8",
        ),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention: got True, proven is false",
        ),
    ],
    ids=["bloom", "falcon", "axial", "quantized", "bidirectional"],
)
def test_rejects_models_that_are_not_proven_before_it_looks_for_weights(tmp_path, model_type, options, message):
    path = write_config(tmp_path, model_type, **options)
    for start in (lambda: LLM(path, **THREADS), lambda: Engine(EngineConfig(model=path, **THREADS))):
        with pytest.raises(UnsupportedModelError) as caught:
            start()
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


@pytest.fixture
def broken(tmp_path):
    """A copy of a model, to be broken."""
    path = tmp_path / "broken"
    shutil.copytree(tiny_model("llama").path, path)
    return path


def assert_refused(path, *words):
    with pytest.raises(ConfigError) as caught:
        Engine(EngineConfig(model=str(path), **THREADS))
    message = str(caught.value)
    assert message.startswith(f"model: got {str(path)!r}, ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_rejects_missing_weights(broken):
    (broken / "model.safetensors").unlink()
    assert_refused(broken, "weights")


def test_rejects_pickled_weights(broken):
    tensors = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(tensors, broken / "pytorch_model.bin")
    assert_refused(broken, "weights")


@pytest.mark.parametrize("num_bytes", [0, 4, 1000, -100])
def test_rejects_truncated_weights(broken, num_bytes):
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:num_bytes])
    assert_refused(broken, "weights")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", True),
        ("hidden_size", "sixty-four"),
        ("hidden_size", None),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 10**12),
        ("vocab_size", -5),
        ("max_position_embeddings", 1e30),
    ],
)
def test_rejects_a_config_of_which_no_model_can_be_made(broken, field, value):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ConfigError) as caught:
        Engine(EngineConfig(model=str(broken), **THREADS))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert message.startswith((field, "config", "model"))


def test_rejects_weights_with_missing_tensors(broken):
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert_refused(broken, "lack 1 tensors", "model.layers.1.self_attn.k_proj.weight")


def test_rejects_weights_that_the_config_has_no_place_for(broken):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert_refused(broken, "1 that the config has no place for", "model.layers.1.self_attn.q_proj.bias")


def test_rejects_weights_of_a_wrong_shape(broken):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(8, 64)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert_refused(broken, "1 of a wrong shape", "model.layers.1.self_attn.k_proj.weight")


def test_rejects_a_directory_without_a_model_and_a_broken_config(tmp_path, broken):
    assert_refused(tmp_path, "no config.json")
    (broken / "config.json").write_text("{")
    assert_refused(broken, "config")


def test_rejects_a_model_without_a_tokenizer(broken):
    with pytest.raises(ConfigError, match="tokenizer"):
        LLM(str(broken), **THREADS)


@pytest.mark.parametrize("as_list", [False, True])
def test_end_tokens_come_from_the_generation_config(broken, as_list):
    reference = tiny_model("llama").references[1]
    eos = reference.token_ids[9]
    end = reference.token_ids.index(eos) + 1
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, eos] if as_list else eos}))
    with Engine(EngineConfig(model=str(broken), **THREADS), tiny_model("llama").module) as engine:
        stopped = engine.add_request(reference.prompt, SamplingParams(max_tokens=64))
        ignoring = engine.add_request(reference.prompt, SamplingParams(max_tokens=64, ignore_eos=True))
        later = engine.add_request(reference.prompt, SamplingParams(max_tokens=64, min_tokens=end))
        run_all(engine)
    assert stopped.output_token_ids == reference.token_ids[:end]
    assert stopped.finish_reason is FinishReason.STOP
    assert ignoring.output_token_ids == reference.token_ids
    assert ignoring.finish_reason is FinishReason.LENGTH
    assert later.output_token_ids[: end - 1] == reference.token_ids[: end - 1]
    assert eos not in later.output_token_ids[:end]


def test_end_tokens_come_from_the_config_where_there_is_no_generation_config(broken):
    reference = tiny_model("llama").references[1]
    eos = reference.token_ids[9]
    (broken / "generation_config.json").unlink()
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
    with Engine(EngineConfig(model=str(broken), **THREADS), tiny_model("llama").module) as engine:
        assert engine.spec.eos_token_ids == (eos,)
        request = engine.add_request(reference.prompt, SamplingParams(max_tokens=64))
        run_all(engine)
    assert request.finish_reason is FinishReason.STOP


def test_rejects_prompts_beyond_the_models_positions(tmp_path):
    path = write_model(tmp_path / "short", "llama", max_position_embeddings=64)
    with Engine(EngineConfig(model=path, **THREADS)) as engine:
        engine.add_request([5] * 60, SamplingParams(max_tokens=4))
        with pytest.raises(ConfigError, match=r"got 61 \+ 4 = 65 tokens, legal is at most 64 \(max_position_embedd"):
            engine.add_request([5] * 61, SamplingParams(max_tokens=4))
        run_all(engine)
