"""`longspan needle`: prompts of exact lengths with the fact where it belongs, honest verdicts, a picture."""

import importlib.util
import json
import struct

import pytest
from serving import served_model

from longspan.cli.haystack import FACT, Haystack, Verdict, verdict
from longspan.models.loader import load_tokenizer

OPTIONS = ("--executor", "threads", "--context-parallel-size", "2", "--page-size", "4", "--stripe-size", "64")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("123456.", (Verdict.RIGHT, "123456")),
        ("The number of the safe is 123,456, I think.", (Verdict.RIGHT, "123456")),
        ("In 1999 it was 123456", (Verdict.RIGHT, "123456")),
        ("It is 123457.", (Verdict.WRONG_NUMBER, "123457")),
        ("12345", (Verdict.WRONG_NUMBER, "12345")),
        ("I do not know.", (Verdict.NO_NUMBER, "")),
        ("", (Verdict.NO_NUMBER, "")),
    ],
)
def test_a_verdict_says_what_an_answer_is_worth(answer, expected):
    assert verdict(answer, "123456") == expected


@pytest.mark.parametrize("has_template", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_has_its_length_and_the_fact_its_place(depth, has_template):
    tokenizer = load_tokenizer(served_model(has_template=has_template).path)
    prompt = Haystack(tokenizer, 3000).prompt(1000, depth, "123456")
    assert len(prompt) == 1000
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    place = text.index(f"{FACT}123456.")
    assert text.count(FACT) == 2
    room = text.index("\n\nWhat is the number") - len(f"\n{FACT}123456.\n")
    assert abs(place - depth * room) < 40
    assert text.endswith("[assistant]" if has_template else FACT)


@pytest.mark.cover
def test_recall_finds_every_needle_and_a_picture_shows_it(longspan, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.png"
    options = ("--lengths", "1k,3000", "--depths", "0,50,100", "--plot", str(path))
    outcome = longspan("needle", "recall", *OPTIONS, *options)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [
        "depth  1k     3000",
        "0 %    right  right",
        "50 %   right  right",
        "100 %  right  right",
        "6 of 6 right",
    ]
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 300
    assert height > 200


def test_a_model_that_knows_nothing_is_told_so(longspan):
    options = ("--lengths", "600", "--depths", "0,100", "--max-tokens", "4", "--json")
    outcome = longspan("needle", served_model().path, *OPTIONS, *options)
    assert outcome.code == 0, outcome.err
    answers = json.loads(outcome.out)["answers"]
    assert [(one["length"], one["depth"]) for one in answers] == [(600, 0.0), (600, 100.0)]
    assert all(one["verdict"] != "right" and len(one["number"]) == 6 and one["ttft_s"] > 0 for one in answers)
    assert answers[0]["number"] != answers[1]["number"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lengths", "10"), ("lengths", "at least")),
        (("--lengths", "x"), ("lengths: got 'x'",)),
        (("--depths", "101"), ("depths", "0 to 100")),
        (("--depths", "a,b"), ("depths", "0 to 100")),
        (("--plot", "x.pdf"), ("plot", ".png")),
        (("--page-size", "0"), ("--page-size: got 0",)),
    ],
)
def test_rejects(longspan, options, words):
    outcome = longspan("needle", "recall", "--executor", "threads", *options)
    assert (outcome.code, outcome.out) == (2, "")
    for word in words:
        assert word in outcome.err.splitlines()[-1]


def test_a_picture_without_matplotlib_names_the_command_that_installs_it(longspan, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    outcome = longspan("needle", "recall", "--executor", "threads", "--plot", "x.png")
    assert outcome.code == 2
    assert "pip install 'longspan[plot]'" in outcome.err
