"""Requests whose tokens are the same with and without drafts, the ways to spread them, and a broken way to accept
drafts."""

import functools
from typing import Any

import pytest
from tiny_models import FAMILIES, VOCAB_SIZE, random_prompt, run_requests, tiny_model

from longspan.scheduler.request import Draft, Request
from longspan.types import SamplingParams

NUM_TOKENS = 30
"""Tokens of every answer."""

STRIPED = {"context_parallel_size": 2, "placement": "striped", "page_size": 4, "stripe_size": 4}

SPREADS: dict[str, tuple[Any, ...]] = {
    "family": tuple(FAMILIES),
    "strategy": ("pass_q", "auto", "gather_kv", "pass_kv", "tree"),
    "placement": ("striped", "packed", "spill", "auto"),
    "context_parallel_size": (2, 1, 3, 4),
    "page_size": (4, 16, 1),
    "temperature": (0.0, 0.8),
    "async_scheduling": (True, False),
}
"""Ways to spread a request, for covers."""


def name_of(case: dict[str, Any]) -> str:
    """Name of a case of a cover."""
    return "-".join(str(value) for value in case.values())


def params_of(temperature: float, seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=NUM_TOKENS, temperature=temperature, top_p=0.95, seed=seed, ignore_eos=True)


@functools.cache
def asked(family: str, temperature: float) -> list[tuple[list[int], SamplingParams, list[int]]]:
    """(prompt, parameters, output alone on one rank) of prompts of 31 and 97 tokens."""
    model = tiny_model(family)
    requests = [(r.prompt, params_of(temperature, i)) for i, r in enumerate(model.references[1:3])]
    outputs = [request.output_token_ids for request in run_requests(model, requests)]
    return [(*request, output) for request, output in zip(requests, outputs, strict=True)]


def prompts_alike() -> tuple[list[list[int]], list[list[int]]]:
    """Five prompts that begin alike, and what "llama" answers to each alone, sampled with its place as seed."""
    prompts = [random_prompt(40, 1) + random_prompt(1 + i, 2 + i) for i in range(5)]
    alone = [
        request.output_token_ids
        for i, prompt in enumerate(prompts)
        for request in run_requests(tiny_model("llama"), [(prompt, params_of(0.8, i))])
    ]
    return prompts, alone


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    """Options of an engine for a case of `SPREADS`, without its family and temperature."""
    options = {name: value for name, value in case.items() if name not in ("family", "temperature")}
    size = options["context_parallel_size"]
    if options["strategy"] == "tree":
        options["nodes"] = tuple(rank * 2 // size for rank in range(size))
    return options | {"stripe_size": 2 * options["page_size"]}


class OddAndEven:
    """Constraint under which odd and even tokens alternate, and which counts the tokens that it has taken."""

    def __init__(self, num_taken: int = 0) -> None:
        self._num_taken = num_taken

    def allowed(self) -> bytes:
        return bytes([0b10101010 if self._num_taken % 2 else 0b01010101]) * (VOCAB_SIZE // 8)

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == self._num_taken % 2
        self._num_taken += 1

    def copy(self) -> "OddAndEven":
        return OddAndEven(self._num_taken)


def accept_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the first wrong draft counts as right, and the token sampled behind it is kept."""
    original = Request.take_sampled

    def take_sampled(self: Request, sampled: Any, failed: Any) -> int:
        drafts = list(self.drafts)
        for i, draft in enumerate(drafts):
            token_id = sampled[len(self.token_ids) + i].token_id
            if draft.token_id != token_id:
                drafts[i] = Draft(token_id, draft.constraint)
                break
        self.drafts = drafts
        return original(self, sampled, failed)

    monkeypatch.setattr(Request, "take_sampled", take_sampled)
