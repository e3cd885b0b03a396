"""JSON schemas as constraints: what tokens stand for, which schemas are taken, and whole generations."""

import functools
import json
import random
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from tiny_models import VOCAB_SIZE, write_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from longspan import LLM, ConfigError, LongspanError, SamplingParams
from longspan.models import grammar
from longspan.models.grammar import GrammarConstraint, make_grammars
from longspan.models.recall_tokenizer import EOS_ID, build_tokenizer
from longspan.models.recall_tokenizer import VOCAB_SIZE as RECALL_VOCAB_SIZE
from longspan.types import FinishReason

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]
PAD_ID, BOS_ID, END_ID = range(3)
CORPUS = [
    '{"name": "Zoë", "count": 12, "color": "red", "tags": ["a", "b"]}',
    '{\n    "name": "said the colored countess",\n    "count": -3\n}',
    "the name of the color is the count of the tags, and the rest is 日本語 and 🙂",
] * 3

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": -50, "maximum": 5000},
        "color": {"enum": ["red", "green", "Zoë's 🙂", "</s>"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "count", "color"],
    "additionalProperties": False,
}
MOST_TOKENS = 1000
"""No output of the schema takes more, however much white space there is."""


def wrapped(backend, **options):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options
    )


@functools.cache
def byte_level():
    """GPT-2, Llama 3, Qwen: BPE over the names of bytes; with a mark that is no special token to the tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=288, special_tokens=SPECIAL_TOKENS, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("  ", normalized=False)])
    return wrapped(backend)


def sentence_piece(*, prepends_with_normalizer):
    """Llama 2 (`Prepend`) and its modern form (`Metaspace`): words with their space, bytes for what is missing."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prepends_with_normalizer:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(stages)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=[*SPECIAL_TOKENS, "<unk>", *byte_tokens],
        initial_alphabet=["▁", *map(chr, range(0x21, 0x7F))],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in byte_tokens]
    return wrapped(Tokenizer.from_str(json.dumps(state)), unk_token="<unk>")


def unigram():
    """T5 and its like, with a `Metaspace` decoder; without tokens for bytes it cannot write most of Unicode."""
    pieces = [*SPECIAL_TOKENS, "<unk>", "▁", "▁the", "▁name", "name", '▁{"', *map(chr, range(0x21, 0x7F))]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(name, special=True) for name in [*SPECIAL_TOKENS, "<unk>"]])
    return wrapped(backend, unk_token="<unk>")


TOKENIZERS = {
    "byte": lambda: build_tokenizer(4096),
    "byte_level": byte_level,
    "sentence_piece_prepend": lambda: sentence_piece(prepends_with_normalizer=True),
    "sentence_piece_metaspace": lambda: sentence_piece(prepends_with_normalizer=False),
}


@functools.cache
def mapped(name):
    """A tokenizer, its grammars with 13 padding ids, and its end token."""
    tokenizer = TOKENIZERS[name]()
    end_id = tokenizer.eos_token_id
    return tokenizer, make_grammars(tokenizer, len(tokenizer) + 13, [end_id]), end_id


def ids_of(mask):
    return [i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1]


def text_of(tokenizer, token_ids):
    """The text behind another one: at the very start some tokenizers drop a space."""
    (front,) = tokenizer.convert_tokens_to_ids(["a"])
    return tokenizer.decode([front, *token_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)[1:]


def satisfies(text, schema):
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def random_output(constraint, end_id, seed):
    """Tokens drawn evenly from the allowed ones until the end token, and the allowed ones at each place."""
    generator = random.Random(seed)
    token_ids, choices = [], []
    while True:
        choices.append(ids_of(constraint.allowed()))
        token_id = generator.choice(choices[-1])
        if token_id == end_id:
            return token_ids, choices
        token_ids.append(token_id)
        constraint.accept(token_id)


# ------------------------------------------------------------------------------------------------ what tokens stand for


@pytest.mark.parametrize("name", TOKENIZERS)
def test_random_outputs_satisfy_the_schema_and_end_exactly_when_they_do(name):
    """No special token, padding id or mark is ever allowed, and the tokens' text is what the grammar thinks it is."""
    tokenizer, grammars, end_id = mapped(name)
    schema = {**SCHEMA, "properties": {**SCHEMA["properties"], "color": {"enum": ["Zoë 🙂", "</s>", "<think>"]}}}
    marks = {i for i, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items() if token.content.strip()}
    for seed in range(20):
        token_ids, choices = random_output(grammars.compile(json.dumps(schema)), end_id, seed)
        assert satisfies(text_of(tokenizer, token_ids), schema)
        for i, allowed in enumerate(choices):
            assert (end_id in allowed) == satisfies(text_of(tokenizer, token_ids[:i]), schema)
            assert not {*allowed} & marks - {end_id}
            assert max(allowed) < len(tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_number_may_end_or_go_on(name):
    tokenizer, grammars, end_id = mapped(name)
    one, seven, nine = tokenizer.convert_tokens_to_ids(["1", "7", "9"])
    constraint = grammars.compile('{"type": "integer", "minimum": 7, "maximum": 19}')
    assert {one, seven, nine} <= {*ids_of(constraint.allowed())}
    constraint.accept(one)
    assert end_id not in ids_of(constraint.allowed())
    constraint.accept(seven)
    assert ids_of(constraint.allowed()) == [end_id]
    constraint.accept(end_id)
    assert ids_of(constraint.allowed()) == [end_id]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "text",
    [
        '{"name":"Zoë 日本語 🙂", "count": 12}',
        '{\n    "name": "a\\n\\u0000b",\n    "tags": [true, null, -1.5e3]\n}',
        "{}",
    ],
)
def test_the_tokens_that_the_tokenizer_itself_would_write_are_allowed(name, text):
    tokenizer, grammars, end_id = mapped(name)
    constraint = grammars.compile('{"type": "object"}')
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if text_of(tokenizer, token_ids) != text:  # with a space in front, where none is allowed
        token_ids = tokenizer.encode("\n" + text, add_special_tokens=False)
        while text_of(tokenizer, token_ids) != text:
            token_ids.pop(0)
    for token_id in token_ids:
        assert token_id in ids_of(constraint.allowed())
        constraint.accept(token_id)
    assert end_id in ids_of(constraint.allowed())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_that_is_forced_is_written_as_the_tokenizer_writes_it(name):
    """Also where it holds the characters of a special token, which are text here."""
    tokenizer, grammars, end_id = mapped(name)
    text = '"the name of </s> Zoë <|eos|> 🙂"'
    token_ids, choices = random_output(grammars.compile(json.dumps({"const": json.loads(text)})), end_id, 0)
    assert text_of(tokenizer, token_ids) == text
    assert all(len(allowed) <= 2 for allowed in choices)
    if name == "byte_level":
        plain = '"the name of '
        assert token_ids[: len(tokenizer.tokenize(plain)) - 1] == tokenizer.encode(plain, add_special_tokens=False)[:-1]


def test_a_token_that_ends_the_request_is_no_text_even_if_it_has_one():
    tokenizer = byte_level()
    (line_break,) = tokenizer.encode("\n")
    grammars = make_grammars(tokenizer, VOCAB_SIZE, [END_ID, line_break])
    constraint = grammars.compile('{"type": "array", "items": {"const": 1}, "maxItems": 1}')
    for token in ("[", "1", "]"):
        allowed = ids_of(constraint.allowed())
        assert not {END_ID, line_break} & {*allowed}
        constraint.accept(tokenizer.convert_tokens_to_ids(token))
    assert ids_of(constraint.allowed()) == sorted([END_ID, line_break])


def test_a_token_that_was_not_allowed_is_an_error_and_so_is_all_that_follows():
    tokenizer, grammars, _ = mapped("byte_level")
    constraint = grammars.compile('{"type": "object"}')
    for token in ("[", "{"):
        with pytest.raises(LongspanError, match=r"json_schema: token \d+ cannot follow"):
            constraint.accept(tokenizer.convert_tokens_to_ids(token))


def test_white_space_comes_to_an_end():
    tokenizer, grammars, _ = mapped("byte")
    constraint = grammars.compile('{"type": "object"}')
    constraint.accept(ord("{"))
    for _ in range(20):
        constraint.accept(ord(" "))
    assert not {*ids_of(constraint.allowed())} & {*b" \t\r\n"}
    assert tokenizer.decode([ord("}")]) == "}"
    constraint.accept(ord("}"))


def test_threads_may_compile_at_the_same_time():
    _, grammars, end_id = mapped("byte_level")
    schemas = [json.dumps({**SCHEMA, "properties": {**SCHEMA["properties"], "count": {"const": i}}}) for i in range(16)]

    def outputs(schema):
        return [random_output(grammars.compile(schema), end_id, seed) for seed in range(3)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outputs, schemas)) == list(map(outputs, schemas))


def test_texts_may_be_encoded_while_schemas_compile():
    """Encoding sets the truncation of the tokenizer, which must not be shared."""
    tokenizer, grammars, end_id = mapped("byte_level")
    before = random_output(grammars.compile(json.dumps(SCHEMA)), end_id, 1)
    tokenizer("the name", truncation=True, max_length=2)
    assert random_output(grammars.compile(json.dumps(SCHEMA)), end_id, 1) == before
    assert len(tokenizer("the name of the color")["input_ids"]) > 2


# ------------------------------------------------------------------------------------------------ tokenizers refused


def word_piece():
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "</s>", "a", "b", "##a", '"'])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def letters_only():
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def partly_python():
    class Split:
        def pre_tokenize(self, pre_tokenized):
            pass

    tokenizer = letters_only()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Split())
    return tokenizer


class Slow:
    """A tokenizer written in Python."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (word_piece, "it has no token 'a', or adds something between tokens"),
        (letters_only, "no token stands for b' ' alone"),
        (partly_python, "it cannot be copied (Custom PreTokenizer cannot be serialized)"),
        (Slow, "it has no fast implementation"),
    ],
)
def test_rejects_tokenizers_whose_tokens_are_no_bytes(make, reason):
    tokenizer = make()
    with pytest.raises(ConfigError) as caught:
        make_grammars(tokenizer, 300, [1])
    assert str(caught.value) == (
        f"json_schema: got {type(tokenizer).__name__}, legal is a tokenizer whose tokens stand for bytes: {reason}"
    )


def without_tokens(*dropped):
    """The byte-level tokenizer without the tokens of some bytes, and without what is merged from them."""
    spec = json.loads(byte_level().backend_tokenizer.to_str())
    names = {bytes_to_unicode()[byte] for byte in dropped}
    kept = [name for name in spec["model"]["vocab"] if not names & set(name)]
    spec["model"]["vocab"] = {name: token_id for token_id, name in enumerate(kept)}
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if not names & set("".join(pair))]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIAL_TOKENS]
    return wrapped(Tokenizer.from_str(json.dumps(spec)))


@pytest.mark.parametrize("dropped", [(0xF1, 0xF2), (0x9F,), range(0x80, 0xF5)], ids=["rare", "later", "all"])
def test_a_vocabulary_without_some_bytes_writes_what_it_can(dropped):
    tokenizer = without_tokens(*dropped)
    grammars = make_grammars(tokenizer, len(tokenizer), [END_ID])
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}}, "required": ["name"]}
    for seed in range(8):
        output, _ = random_output(grammars.compile(json.dumps(schema)), END_ID, seed)
        jsonschema.validate(json.loads(tokenizer.decode(output, skip_special_tokens=True)), schema)
    with pytest.raises(ConfigError, match=r"json_schema: got the character .*, legal are those that the model can"):
        grammars.compile(json.dumps({"const": "\U00050000" if 0xF1 in dropped else "\U0001f642"}))


def test_a_vocabulary_of_whole_characters_is_taken():
    tokenizer = unigram()
    grammars = make_grammars(tokenizer, len(tokenizer), [2])
    output, _ = random_output(grammars.compile('{"enum": ["red", "green"]}'), 2, 1)
    assert json.loads(tokenizer.decode(output, skip_special_tokens=True)) in ("red", "green")


@pytest.mark.parametrize("eos_token_ids", [(), (VOCAB_SIZE, VOCAB_SIZE + 5)])
def test_rejects_a_model_that_cannot_end(eos_token_ids):
    with pytest.raises(ConfigError, match="json_schema: got a model without an end token"):
        make_grammars(byte_level(), VOCAB_SIZE, eos_token_ids)


# ------------------------------------------------------------------------------------------------ schemas refused


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 1}, "Unsatisfiable schema"),
        ({"enum": []}, "Unsatisfiable schema"),
        ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "Unsatisfiable schema"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "Unsatisfiable schema"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable schema"),
        ({"$ref": "#"}, "no token can follow"),
        ({"type": "foo"}, "Invalid type: foo"),
        ({"type": "object", "required": "a"}, "Expected array for 'required'"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"if": {}, "then": {}}, 'Unimplemented keys: ["if", "then"]'),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "array", "contains": {}}, 'Unimplemented keys: ["contains"]'),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, 'Unimplemented keys: ["dependentRequired"]'),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, 'Unimplemented keys: ["propertyNames"]'),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf constraints are not supported"),
        ({"type": "string", "format": "color"}, "Unknown format: color"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead and look-behind, is not supported"),
        ({"$ref": "http://localhost/schema"}, "is not present in a registry"),
        ({"$ref": "#/$defs/missing"}, "does not exist"),
        ({"const": "\ud800"}, "hex escape"),
        ({"properties": {"a": {"minimum": 10**400}}}, "number out of range"),
        (functools.reduce(lambda inner, _: {"items": inner}, range(150), {}), "recursion limit exceeded"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value)[:60],
)
def test_rejects_schemas_that_cannot_be_enforced_or_satisfied(schema, reason):
    _, grammars, _ = mapped("byte_level")
    with pytest.raises(ConfigError) as caught:
        grammars.compile(json.dumps(schema))
    message = str(caught.value)
    assert message.startswith("json_schema: got '{") or message.startswith('json_schema: got "{')
    assert "legal is a JSON Schema that can be enforced and satisfied: " in message
    assert reason in message.partition("satisfied: ")[2]
    assert "\n" not in message
    assert len(message) < 700


def test_rejects_keys_that_would_weaken_the_schema():
    _, grammars, _ = mapped("byte_level")
    with pytest.raises(ConfigError, match="json_schema: got the key 'x-guidance', legal are those of JSON Schema"):
        grammars.compile('{"x-guidance": {"lenient": true}, "not": {}}')


def test_annotations_are_no_constraints():
    _, grammars, _ = mapped("byte_level")
    grammars.compile(
        '{"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x", "title": "T", "description": "D",'
        '"type": "object", "properties": {"a": {"type": "integer", "default": 3, "examples": [4]}},'
        '"$defs": {"unused": {"not": {}}}}'
    )


# ------------------------------------------------------------------------------------------------ whole generations


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """Random weights; 300 logits, of which the tokenizer knows 290."""
    path = tmp_path_factory.mktemp("json-model")
    write_model(path, "llama")
    tokenizer = byte_level()
    assert len(tokenizer) <= VOCAB_SIZE - 10
    tokenizer.save_pretrained(path)
    return str(path)


OPTIONS = {
    "executor": "threads",
    "threads_per_rank": 1,
    "kv_cache_memory": 2**25,
    "page_size": 4,
    "stripe_size": 8,
    "max_num_batched_tokens": 64,
}
PROMPTS = ["the name of the color", "count the tags, and say which color they have, if any: " * 4]


@pytest.fixture(scope="module")
def llm(model_path):
    with LLM(model_path, **OPTIONS) as running:
        yield running


@pytest.mark.cover
def test_outputs_satisfy_the_schema_greedy_and_sampled_on_any_number_of_ranks(llm, model_path):
    params = [
        SamplingParams(max_tokens=MOST_TOKENS, json_schema=json.dumps(SCHEMA), **more)
        for more in (
            {},
            {"temperature": 1.0, "seed": 3},
            {"temperature": 5.0, "seed": 4},
            {"temperature": 1.0, "seed": 5, "top_k": 3, "repetition_penalty": 1.3, "presence_penalty": 2.0},
            {"temperature": 1.0, "seed": 6, "logit_bias": {END_ID: 100, PAD_ID: 100, VOCAB_SIZE - 1: 100}},
        )
    ]
    unconstrained = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    prompts = [PROMPTS[i % 2] for i in range(6)]
    alone = llm.generate(prompts, [*params, unconstrained])
    for output in alone[:5]:
        completion = output.outputs[0]
        assert completion.finish_reason is FinishReason.STOP
        assert completion.error is None
        assert completion.token_ids[-1] == END_ID
        jsonschema.validate(json.loads(completion.text), SCHEMA)
    assert len({output.outputs[0].text for output in alone}) == 6
    assert not satisfies(alone[5].outputs[0].text, SCHEMA)
    tokens = [output.outputs[0].token_ids for output in alone]
    with LLM(model_path, context_parallel_size=2, placement="striped", **OPTIONS) as two:
        assert [output.outputs[0].token_ids for output in two.generate(prompts, [*params, unconstrained])] == tokens


def test_max_tokens_may_cut_an_output_short(llm):
    (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=3, json_schema=json.dumps(SCHEMA)))
    assert output.outputs[0].finish_reason is FinishReason.LENGTH
    assert output.outputs[0].text.startswith("{")


def test_min_tokens_lengthens_an_output_that_can_go_on_and_no_other(llm):
    schemas = {'{"type": "integer", "minimum": 10}': 12, '{"type": "integer", "minimum": 10, "maximum": 99}': 3}
    for schema, most_tokens in schemas.items():
        params = SamplingParams(max_tokens=60, min_tokens=12, temperature=1.0, seed=1, json_schema=schema)
        (output,) = llm.generate(PROMPTS[0], params)
        completion = output.outputs[0]
        assert completion.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(completion.text), json.loads(schema))
        assert (len(completion.token_ids) >= 12) == (most_tokens >= 12)


def test_an_output_that_cannot_go_on_says_so_and_others_are_not_affected(llm, monkeypatch):
    def accept(constraint, token_id):
        raise LongspanError(f"json_schema: nothing can follow {token_id}")

    plain = SamplingParams(max_tokens=5, ignore_eos=True)
    (before,) = llm.generate(PROMPTS[0], plain)
    params = [SamplingParams(max_tokens=5, json_schema="{}"), plain]
    monkeypatch.setattr(GrammarConstraint, "allowed", lambda constraint: None)
    monkeypatch.setattr(GrammarConstraint, "accept", accept)
    broken, whole = (output.outputs[0] for output in llm.generate([PROMPTS[0]] * 2, params))
    (token_id,) = broken.token_ids
    assert (broken.finish_reason, broken.error) == ("error", f"json_schema: nothing can follow {token_id}")
    assert (whole.token_ids, whole.error) == (before.outputs[0].token_ids, None)


def test_rejects_a_schema_before_anything_runs_and_goes_on(llm):
    before = llm.rank_stats()
    impossible = SamplingParams(json_schema='{"type": "integer", "minimum": 5, "maximum": 1}')
    with pytest.raises(ConfigError, match=r"json_schema: got .* Unsatisfiable schema"):
        llm.generate(PROMPTS, [SamplingParams(), impossible])
    assert llm.rank_stats() == before
    (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=60, json_schema='{"const": [1]}'))
    assert json.loads(output.outputs[0].text) == [1]


def test_the_bundled_model_copies_what_the_schema_allows(cache_home):
    fact = "The answer to everything is "
    prompt = f'{fact}{{"a": 42, "b": "x"}}\nNothing else is known.\n{fact}'
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    _, grammars, _ = mapped("byte")
    assert ids_of(grammars.compile(json.dumps(schema)).allowed()) == [ord("{")]
    with LLM("recall", context_parallel_size=2, placement="striped", **OPTIONS) as recall:
        (output,) = recall.generate(prompt, SamplingParams(max_tokens=60, json_schema=json.dumps(schema)))
    assert RECALL_VOCAB_SIZE > EOS_ID
    assert output.outputs[0].text == '{"a": 42, "b": "x"}'
    assert output.outputs[0].token_ids[-1] == EOS_ID
    assert output.outputs[0].finish_reason is FinishReason.STOP


def test_an_llguidance_whose_white_space_has_no_end_is_refused(monkeypatch):
    """vLLM's environment has one."""
    monkeypatch.setattr(grammar.importlib.metadata, "version", lambda name: "1.7.6")
    with pytest.raises(ConfigError, match=r"json_schema: got llguidance 1\.7\.6, legal is 1\.9 or newer"):
        make_grammars(build_tokenizer(1024), RECALL_VOCAB_SIZE, [EOS_ID]).compile('{"type": "boolean"}')
