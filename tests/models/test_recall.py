"""The bundled model does what its oracles say, in stock Transformers; its tokenizer and its cache keep their word."""

import argparse
import functools
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recall_oracle import expected_logits, expected_next
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspan.errors import ConfigError
from longspan.models import model_cache, recall
from longspan.models.recall import build_recall, recall_path
from longspan.models.recall_tokenizer import BOS_ID, EOS_ID, NUM_BYTES, SEP_ID, SPECIAL_TOKENS
from longspan.models.recall_weights import HEAD_DIM, MAX_CONTEXT_LEN, RECALL_VARIANTS, answer_codes

SOURCE_TEXT = Path(argparse.__file__).read_bytes() + Path(os.__file__).read_bytes()
CITIES = ("Paris", "Tokyo", "Cairo", "Lima", "Oslo")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.99)

every_variant = pytest.mark.parametrize("variant", RECALL_VARIANTS)


@pytest.fixture(scope="module")
def model_paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("recall")
    for variant in RECALL_VARIANTS:
        build_recall(root / variant, variant=variant)
    return {variant: root / variant for variant in RECALL_VARIANTS}


@pytest.fixture(scope="module")
def tokenizer(model_paths):
    return AutoTokenizer.from_pretrained(model_paths["smollm3"])


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    """An empty cache directory for `recall_path`, on every platform."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model_cache.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path


@functools.cache
def load(path, dtype=torch.float32, attention="sdpa"):
    """Tests share what this returns and must not change it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()


@torch.inference_mode()
def all_logits(model, ids, first_position=0):
    """[T, VOCAB_SIZE] float64."""
    positions = torch.arange(first_position, first_position + len(ids))[None]
    return model(torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0].double()


def assert_continues_exactly(logits, ids, match_len):
    expected = expected_next(ids, match_len)
    assert len(expected) > 30
    answers = logits[list(expected)].argmax(-1)
    assert answers.tolist() == list(expected.values())


def needle(i):
    """A sentence whose number cannot be guessed from the other sentences."""
    return f"The magic number of {CITIES[i]} is {7919 * (i + 1) % 9973:04}.".encode()


def prompt_with_needles(num_bytes):
    """Returns a prompt, BOS first, and per needle in it (position that predicts the answer's first byte, answer).

    The sentences stand at `DEPTHS` of the text and once more after it, where each one's number must be predicted.
    """
    sentences = [needle(i) for i in range(len(CITIES))]
    body = SOURCE_TEXT[: num_bytes - 2 * sum(map(len, sentences))]
    cuts = [int(depth * len(body)) for depth in DEPTHS]
    haystack = b"".join(
        sentence + body[cut:end] for sentence, cut, end in zip(sentences, cuts, [*cuts[1:], len(body)], strict=True)
    )
    ids = [BOS_ID, *haystack]
    questions = []
    for sentence in sentences:
        ids += sentence
        questions.append((len(ids) - 6, list(sentence[-5:])))  # each byte is predicted one position earlier
    return ids, questions


# ------------------------------------------------------------------------------------------------ the model


@every_variant
@pytest.mark.parametrize(
    ("dtype", "attention", "num_bytes"),
    [
        (torch.float32, "eager", 1000),
        (torch.bfloat16, "eager", 1500),
        (torch.float32, "sdpa", 2000),
        (torch.bfloat16, "sdpa", 1500),
        (torch.float16, "sdpa", 1000),
    ],
)
def test_every_gram_that_occurred_once_is_continued(model_paths, variant, dtype, attention, num_bytes):
    ids, questions = prompt_with_needles(num_bytes)
    logits = all_logits(load(model_paths[variant], dtype, attention), ids)
    assert_continues_exactly(logits, ids, RECALL_VARIANTS[variant].match_len)
    for position, answer in questions:
        assert logits[position : position + len(answer)].argmax(-1).tolist() == answer


@pytest.mark.cover
@pytest.mark.parametrize(("dtype", "num_bytes"), [(torch.float32, 4000), (torch.bfloat16, 6000)])
def test_needles_are_found_in_kilobytes_of_text(model_paths, dtype, num_bytes):
    ids, questions = prompt_with_needles(num_bytes)
    logits = all_logits(load(model_paths["smollm3"], dtype), ids)
    assert_continues_exactly(logits, ids, 16)
    for position, answer in questions:
        assert logits[position : position + len(answer)].argmax(-1).tolist() == answer


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_up_to_the_last_one_are_told_apart(model_paths, variant, dtype):
    ids = [BOS_ID, *SOURCE_TEXT[:1200]]
    logits = all_logits(load(model_paths[variant], dtype), ids, first_position=MAX_CONTEXT_LEN - len(ids))
    assert_continues_exactly(logits, ids, RECALL_VARIANTS[variant].match_len)


@every_variant
def test_repeated_grams_give_the_logits_of_their_votes(model_paths, variant):
    phrase = b"and the winner is: "
    votes = b"A", b"A", b"filler", b"B", b"B", b"B", b"C", b""
    ids = [BOS_ID, *b" ".join(phrase + vote for vote in votes)[:-1], *SOURCE_TEXT[:1000], *phrase]
    logits = all_logits(load(model_paths[variant]), ids)
    expected = expected_logits(ids, RECALL_VARIANTS[variant].match_len)
    assert len(expected) > 100
    assert (logits[list(expected)] - torch.stack(list(expected.values()))).abs().max() < 1e-3
    # 3 of 7 for B, 2 of 7 for A: far enough apart for a wrong merge to show.
    final = expected[len(ids) - 1]
    assert final.argmax() == ord("B")
    assert final.sort(descending=True).indices[1] == ord("A")


def test_generation_continues_a_needle_and_stops_at_a_copied_end_of_sequence(model_paths):
    model = load(model_paths["smollm3"])
    ids = [BOS_ID, *needle(0), EOS_ID, *SOURCE_TEXT[:300], *needle(0)[:-5]]
    generated = model.generate(torch.tensor([ids]), max_new_tokens=20)[0, len(ids) :]
    assert generated.tolist() == [*needle(0)[-5:], EOS_ID]


def test_special_tokens_are_copied_like_bytes(model_paths):
    ids = [BOS_ID, *b"before the separator", SEP_ID, *b"after", SEP_ID, *b"before the separator", SEP_ID]
    logits = all_logits(load(model_paths["smollm3"]), ids)
    assert logits[-2:].argmax(-1).tolist() == [SEP_ID, ord("a")]


def test_a_chat_prompt_without_beginning_of_sequence_is_continued(model_paths, tokenizer):
    messages = [
        {"role": "user", "content": needle(1).decode() + " " + SOURCE_TEXT[:300].decode()},
        {"role": "assistant", "content": " \n Noted.\n"},
        {"role": "user", "content": needle(1)[:-5].decode()},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == list("".join(message["content"] for message in messages).encode())
    generated = load(model_paths["smollm3"]).generate(torch.tensor([ids]), max_new_tokens=5)[0, len(ids) :]
    assert bytes(generated.tolist()) == needle(1)[-5:]


@every_variant
def test_the_model_loads_as_what_it_says_it_is(model_paths, variant):
    model = load(model_paths[variant])
    spec = RECALL_VARIANTS[variant]
    assert type(model).__name__ == spec.architecture
    assert model.config.num_key_value_heads == spec.num_kv_heads
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
    assert windows == [spec.local_window] * len(spec.local_layers()) + [None]
    if spec.model_type == "smollm3":
        assert [layer.self_attn.use_rope for layer in model.model.layers][-1] == 0
    if spec.local_window is not None:
        assert spec.local_window > max(distance for _, distances in spec.local_layers() for distance in distances)


@every_variant
def test_every_norm_but_the_last_is_the_identity(model_paths, variant):
    model = AutoModelForCausalLM.from_pretrained(model_paths[variant])  # its own, for the hooks
    norms = {
        name: module for name, module in model.named_modules() if name.endswith(("input_layernorm", "q_norm", "k_norm"))
    }
    changes = dict.fromkeys(norms, 0.0)

    def record(name):
        def hook(module, inputs, output):
            # The first tokens look past the start; heads that do nothing have queries of 0.
            change = (output - inputs[0])[:, 40:].abs().max() / inputs[0].abs().max().clamp(min=1e-9)
            changes[name] = max(changes[name], float(change))

        return hook

    for name, module in norms.items():
        module.register_forward_hook(record(name))
    all_logits(model, [BOS_ID, *SOURCE_TEXT[:200]])
    assert max(changes.values()) < 1e-5


@every_variant
def test_the_token_next_to_a_target_is_the_runner_up_at_every_distance(variant):
    spec = RECALL_VARIANTS[variant]
    num_tokens = MAX_CONTEXT_LEN if spec.local_window is None else spec.local_window
    distances = torch.arange(num_tokens, dtype=torch.float64)
    loss = torch.zeros_like(distances)
    for pair in range(spec.num_position_pairs):
        loss += 1 - (distances * spec.rope_theta ** (-2 * pair / HEAD_DIM)).cos()
    assert loss[1:].argmin() == 0


def test_answer_codes_are_mutually_unbiased():
    codes = answer_codes().double()
    products = codes @ codes.T
    assert torch.equal(products.diag(), torch.full((len(codes),), 64.0, dtype=torch.float64))
    assert (products - torch.diag(products.diag())).abs().max() == 8


# ------------------------------------------------------------------------------------------------ the tokenizer


texts = st.lists(
    st.text()
    | st.sampled_from(
        [*SPECIAL_TOKENS, "<|", "\r\n", "  ", "\t", "\u00a0", "👩‍👩‍👧", "é", "e\u0301", "\x00", "\ufffd"]
    ),
    max_size=8,
).map("".join)


@pytest.mark.cover
@given(text=texts)
def test_a_text_is_its_bytes_and_comes_back_unchanged(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids == [BOS_ID, *text.encode()]
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids[1:]) == text


@every_variant
def test_every_variant_loads_the_same_tokenizer(model_paths, variant):
    tokenizer = AutoTokenizer.from_pretrained(model_paths[variant])
    assert tokenizer("  <|eos|> é\n ").input_ids == [BOS_ID, *"  <|eos|> é\n ".encode()]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(NUM_BYTES, NUM_BYTES + 4))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS_ID, EOS_ID)
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(model_paths[variant]).config.vocab_size


# ------------------------------------------------------------------------------------------------ files


def test_the_path_is_built_once_and_then_reused(cache_home, monkeypatch):
    path = recall_path()
    assert path.is_relative_to(cache_home / "longspan")
    assert AutoTokenizer.from_pretrained(path)("a").input_ids == [BOS_ID, ord("a")]
    monkeypatch.setattr(recall, "build_recall", lambda *args, **kwargs: pytest.fail("built again"))
    assert recall_path() == path


def test_another_builder_has_another_path(cache_home, monkeypatch):
    path = recall_path()
    monkeypatch.setattr(recall, "builder_digest", lambda: "0123456789ab")
    assert recall_path() != path


def test_variants_have_paths_of_their_own(cache_home):
    assert recall_path("llama") != recall_path()


def test_a_half_written_directory_is_not_used(cache_home):
    path = recall_path()
    for name in ("model.safetensors", "tokenizer.json"):
        (path / name).unlink()
    abandoned = path.with_name(f".{path.name}.abandoned")
    abandoned.mkdir()
    (abandoned / "config.json").write_text("{")
    assert recall_path() == path
    load(path)
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, abandoned.name}


def test_a_builder_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(recall, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        build_recall(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_concurrent_builders_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "model"
    start = threading.Barrier(4)
    errors = []

    def build():
        start.wait()
        try:
            build_recall(path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(tmp_path.iterdir()) == [path]
    load(path)


def test_a_rebuild_keeps_the_files_of_others(tmp_path):
    path = tmp_path / "model"
    build_recall(path)
    (path / "notes.txt").write_text("mine")
    build_recall(path, dtype=torch.bfloat16)
    assert (path / "notes.txt").read_text() == "mine"
    assert AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype == torch.bfloat16


def test_rejects_unknown_variants_and_dtypes(tmp_path, cache_home):
    with pytest.raises(ConfigError, match=r"variant: got 'gpt2', expected one of smollm3"):
        recall_path("gpt2")
    with pytest.raises(ConfigError, match=r"variant: got 'gpt2'"):
        build_recall(tmp_path / "model", variant="gpt2")
    with pytest.raises(ConfigError, match=r"dtype: got torch\.int8, expected one of torch\.float32"):
        build_recall(tmp_path / "model", dtype=torch.int8)
    assert not (tmp_path / "model").exists()
