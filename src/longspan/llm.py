"""The Python API: text or token ids in, text out. Shaped like vLLM's.

    from longspan import LLM, SamplingParams

    with LLM("recall", context_parallel_size=2) as llm:
        output = llm.generate(text, SamplingParams(max_tokens=32))[0]
        print(output.outputs[0].text)

Holds outputs, timing and the loop over steps. Must not know how steps run, nor how tokens become text, and imports
torch only while the ranks import it too.
Read next: `longspan.engine.output_reader`, `longspan.engine.engine`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from longspan.config import EngineConfig
from longspan.engine.closing import ClosedAtExit
from longspan.engine.output_reader import OutputReader
from longspan.engine.processes import early_ranks
from longspan.engine.update import update_of
from longspan.errors import ConfigError
from longspan.imports import quick_imports
from longspan.kv.page_directory import open_directory
from longspan.models.detokenizer import encode_prompt, with_special_stops
from longspan.models.names import check_draft_early, check_early
from longspan.scheduler.request import Request
from longspan.types import FinishReason, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from longspan.costmodel.explain import StrategyChoice
    from longspan.engine.stats import RankStats
    from longspan.models.grammar import GrammarConstraint, Grammars

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`."""


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt."""

    text: str
    token_ids: list[int]
    """All generated tokens, an end token included."""
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    """One entry per token, if asked for."""
    index: int = 0
    error: str | None = None
    """Message of the error if `finish_reason` is `ERROR`; the text may then be of no use."""


@dataclass(slots=True)
class RequestOutput:
    """Everything about one finished request."""

    request_id: int
    prompt: str | None
    """The prompt's text, if it was given as text."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None
    """One entry per prompt token, the first one None, if asked for."""
    ttft_s: float | None
    """Seconds from the call of `generate` to the first token; None if an error came before it."""
    tpot_s: float | None
    """Seconds per token after the first; None if there is only one."""
    num_cached_tokens: int
    """Prompt tokens whose KV was found in the prefix cache, or loaded from a tier behind it."""


@dataclass(slots=True)
class Progress:
    """Progress of one request."""

    request_idx: int
    """Index of the prompt in the call of `generate`."""
    prompt_tokens: int
    prefilled_tokens: int
    generated_tokens: int
    elapsed_s: float
    """Seconds since the call of `generate`."""
    prefill_left_s: float | None
    """Estimate of the seconds until the prompt is computed; None when there is nothing to estimate from."""
    new_text: str = ""
    """Text that is final and was in no progress before: all of these together are the output's text."""


class _Running:
    """State that `generate` keeps of a request beside the engine's own."""

    def __init__(self, request_idx: int, prompt: str | None, request: Request, reader: OutputReader) -> None:
        self.request_idx, self.prompt, self.request, self.reader = request_idx, prompt, request, reader
        self._first_s: float | None = None
        self._last_s = 0.0
        self._new_text = ""

    def read(self, now_s: float) -> None:
        """Take in the request's new tokens, `now_s` seconds after the call of `generate`."""
        delta = self.reader.read(update_of(self.request, self.reader.num_generated, now_s))
        self._new_text = delta.text
        if delta.offsets:
            self._first_s, self._last_s = now_s if self._first_s is None else self._first_s, now_s

    def progress(self, now_s: float) -> Progress:
        """Return how far the request is, `now_s` seconds after the call of `generate`."""
        prefill = self.reader.prefill_progress()
        generated = self.reader.num_generated
        return Progress(
            self.request_idx, prefill.total, prefill.processed, generated, now_s, prefill.left_s, self._new_text
        )

    def output(self) -> RequestOutput:
        """Return the output of the request, which has ended."""
        request, params, num_generated = self.request, self.request.params, self.reader.num_generated
        reason = self.reader.finish_reason
        assert reason is not None
        between_s = None if self._first_s is None else self._last_s - self._first_s
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.prompt,
            prompt_token_ids=request.token_ids[: request.prompt_len],
            outputs=[
                CompletionOutput(
                    text=self.reader.text,
                    token_ids=request.output_token_ids[:num_generated],
                    finish_reason=reason,
                    logprobs=None if params.logprobs is None else request.logprobs[:num_generated],
                    error=request.error if reason is FinishReason.ERROR else None,
                )
            ],
            prompt_logprobs=None if params.prompt_logprobs is None else [None, *request.prompt_logprobs],
            ttft_s=self._first_s,
            tpot_s=between_s / (num_generated - 1) if between_s is not None and num_generated > 1 else None,
            num_cached_tokens=self.reader.num_cached,
        )


class LLM(ClosedAtExit):
    """A model on one cp_group of ranks. Close it, or use it as a context manager: it owns processes."""

    def __init__(self, model: str, **options: Any) -> None:
        """Load the model.

        Args:
            model: a directory, a `.gguf` file, `recall`, `smollm2`, or a Hub id.
            **options: fields of `longspan.config.EngineConfig`, for example `context_parallel_size=2`.

        Raises:
            ConfigError: an option is unknown or illegal, or the model is not there or not proven.
            WorkerError: a worker could not start.
        """
        legal = [name for name in EngineConfig.__struct_fields__ if name != "model"]
        for name in options:
            if name not in legal:
                raise ConfigError(f"option: got {name!r}, legal is one of {', '.join(legal)}")
        config = EngineConfig(model=model, **options)
        check_early(model, config.hf_overrides)
        check_draft_early(config.draft_model)
        if config.kv_disk is not None:  # before ranks start
            open_directory(Path(config.kv_disk).expanduser())
        started = time.perf_counter()
        self._grammars: Grammars | None = None
        with early_ranks(config) as launcher:
            with quick_imports(for_good=False):
                from longspan.engine.engine import Engine
                from longspan.models.generation import tokenizer_end_ids
                from longspan.models.inspect import check_proven
                from longspan.models.loader import load_config, load_tokenizer
                from longspan.models.vocabulary import check_draft_tokenizer
            check_proven(load_config(model, config.hf_overrides)[0])  # before anything that an unproven one may lack
            self.tokenizer = load_tokenizer(model)
            check_draft_tokenizer(config.draft_model, self.tokenizer)
            self.engine = Engine(config, launcher=launcher, end_token_ids=tokenizer_end_ids(self.tokenizer))
            """Engine that runs the requests, for tools and tests that look deeper than text."""
        self.load_s = time.perf_counter() - started
        """Seconds until the ranks were ready."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        clamps_max_tokens: bool = False,
    ) -> list[RequestOutput]:
        """Continue prompts, all at once.

        Args:
            prompts: one prompt or several. Text is used raw: nothing stripped, no chat template.
            sampling_params: one for all prompts, or one per prompt; None takes the defaults.
            lora: name of the LoRA adapter of all prompts, or one per prompt, None among them for the model alone; each
                is one of the option `lora`, or was loaded since.
            on_progress: called after every step for every request that advanced.
            clamps_max_tokens: whether `max_tokens` counts only as far as it fits behind a prompt, instead of refusing
                it; always so for the defaults.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            ConfigError: a prompt or a parameter is illegal; nothing was run.
            WorkerError: a worker died or failed; the LLM cannot be used any more.
        """
        several = _as_prompts(prompts)
        if sampling_params is None:
            sampling_params, clamps_max_tokens = SamplingParams(), True
        params = _as_params(sampling_params, len(several))
        if len(params) != len(several):
            raise ConfigError(
                f"sampling_params: got {len(params)} for {len(several)} prompts, legal is one, or one each"
            )
        names = [lora] * len(several) if lora is None or isinstance(lora, str) else [*lora]
        if len(names) != len(several):
            raise ConfigError(f"lora: got {len(names)} for {len(several)} prompts, legal is one, or one each")
        adapters = [None if name is None else self.engine.adapters.find(name) for name in names]
        started = time.perf_counter()
        running: dict[int, _Running] = {}
        try:
            for i, (prompt, one, adapter) in enumerate(zip(several, params, adapters, strict=True)):
                text, token_ids = self._token_ids(prompt)
                one = with_special_stops(self.tokenizer, one)
                if clamps_max_tokens:
                    one = self._clamped(one, len(token_ids))
                request = self.engine.add_request(token_ids, one, constraint=self._constraint(one), adapter=adapter)
                reader = OutputReader(self.tokenizer, token_ids, one)
                running[request.request_id] = _Running(i, text, request, reader)
            while self.engine.has_requests:
                for request in self.engine.step():
                    state, now_s = running[request.request_id], time.perf_counter() - started
                    state.read(now_s)
                    if state.reader.finish_reason is not None and request.finish_reason is None:
                        self.engine.finish(request, state.reader.finish_reason)  # at a stop string
                    if on_progress is not None:
                        on_progress(state.progress(now_s))
        except BaseException:  # a prompt that is refused, a worker that died, Ctrl-C in a notebook
            for state in running.values():
                self.engine.abort(state.request)
            raise
        return [state.output() for state in running.values()]

    def _clamped(self, params: SamplingParams, prompt_len: int) -> SamplingParams:
        """Return parameters with as much of `max_tokens` as fits behind a prompt, but at least `min_tokens`."""
        from longspan.engine.room import find_room

        limit = self.engine.spec.max_position
        most = self.engine.capacity().num_tokens + 1 if limit is None else limit
        room = find_room(prompt_len, most, self.engine.check_fits, params.max_tokens)
        return msgspec.structs.replace(params, max_tokens=max(room, params.min_tokens))

    def _token_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            legal_types = {"prompt": str, "prompt_token_ids": Sequence}
            name = next(iter(prompt), "")
            if name not in legal_types or len(prompt) > 1:
                raise ConfigError(
                    f"prompt: got the keys {sorted(map(str, prompt))}, legal is 'prompt' or 'prompt_token_ids'"
                )
            value = prompt[name]
            if not isinstance(value, legal_types[name]) or (name != "prompt" and isinstance(value, str)):
                raise ConfigError(
                    f"{name}: got {type(value).__name__}, legal is {'text' * (name == 'prompt') or 'a list'}"
                )
            prompt = value
        if isinstance(prompt, str):
            return prompt, encode_prompt(self.tokenizer, prompt)
        if not _is_list(prompt) or not all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
            raise ConfigError(f"prompt: got {type(prompt).__name__}, legal is text or a list of token ids")
        return None, [int(token_id) for token_id in prompt]

    def _constraint(self, params: SamplingParams) -> "GrammarConstraint | None":
        """Return the constraint that `json_schema` or `grammar` asks for, or None."""
        if not params.is_constrained:
            return None
        if self._grammars is None:
            from longspan.models.grammar import make_grammars

            spec = self.engine.spec
            self._grammars = make_grammars(self.tokenizer, spec.vocab_size, spec.eos_token_ids)
        return self._grammars.constraint(params)

    def load_lora_adapter(self, name: str, directory: str) -> None:
        """Load a LoRA adapter, whose name `generate` then takes.

        Raises:
            ConfigError: the name is illegal or taken, or the files are not those of an adapter of this model.
            WorkerError: a worker died meanwhile.
        """
        self.engine.load_adapter(name, directory)

    def unload_lora_adapter(self, name: str) -> None:
        """Let go of a LoRA adapter.

        Raises:
            ConfigError: there is none of this name.
        """
        self.engine.unload_adapter(name)

    def rank_stats(self) -> "list[RankStats]":
        """Return what every rank holds and has done since the LLM was made."""
        return self.engine.rank_stats()

    def strategy_counts(self) -> dict[str, int]:
        """Return the number of (plan, KV group) pairs per strategy since the LLM was made."""
        return self.engine.strategy_counts

    def explain(self) -> "list[StrategyChoice]":
        """Return the strategies chosen so far, per phase and KV group, and each candidate's predicted time."""
        return self.engine.choices.all

    def close(self) -> None:
        """End the ranks. May be called twice."""
        self.engine.close()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one prompt or several as a list."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not _is_list(prompts):
        raise ConfigError(f"prompts: got {type(prompts).__name__}, legal is one prompt or a list of prompts")
    if prompts and all(isinstance(prompt, int) for prompt in prompts):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _as_params(params: SamplingParams | Sequence[SamplingParams], num_prompts: int) -> list[SamplingParams]:
    """Return the parameters as a list, a single one repeated for every prompt."""
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not _is_list(params) or not all(isinstance(one, SamplingParams) for one in params):
        raise ConfigError(
            f"sampling_params: got {type(params).__name__}, legal is a SamplingParams or a list of SamplingParams"
        )
    return [*params]


def _is_list(value: object) -> bool:
    """Whether a value is a sequence other than text or bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))
