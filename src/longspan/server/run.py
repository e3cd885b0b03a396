"""Run of `longspan serve`, from the first check to the exit code.

Holds start, signals and end. Must not know routes.
Read next: `longspan.server.app`; `longspan.engine.async_engine`.

Note [How a server ends]
    first SIGTERM or SIGINT    no new requests (503), those that run may end; exit code 0
    second one                 open requests get an error, and the process ends at once; exit code 128 + signal
    ranks died                 new ones start, and open requests go on (`longspan.engine.recovery`)
    ranks died too often       open requests get an error, and the process ends; exit code 1
"""

import asyncio
import contextlib
import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import uvicorn
from transformers import PreTrainedTokenizerBase

from longspan.config import EngineConfig
from longspan.engine.async_engine import AsyncEngine
from longspan.engine.engine import Engine
from longspan.engine.launcher import Launcher
from longspan.errors import ConfigError, LongspanError
from longspan.models.generation import sampling_defaults, tokenizer_end_ids
from longspan.models.grammar import make_grammars, marks_of, special_names
from longspan.models.inspect import check_proven
from longspan.models.loader import load_config, load_tokenizer
from longspan.models.vocabulary import check_draft_tokenizer
from longspan.server.app import make_app
from longspan.server.config import ServerConfig
from longspan.server.garbage import collect_new_objects_only, collect_when_idle
from longspan.server.grammars import LazyGrammars
from longspan.server.lengths import Lengths, check_max_model_len
from longspan.server.listener import close, listen, url_of, widen
from longspan.server.metrics import Metrics
from longspan.server.parsing.select import choose_parsers
from longspan.server.sse import HttpProtocol
from longspan.server.state import ServerState
from longspan.server.templates import template_text, use_template_
from longspan.server.token_texts import TokenTexts
from longspan.server.tokenizers import TokenizerPool
from longspan.server.turns import ACCEPTS

if TYPE_CHECKING:
    from longspan.server.tracing import Traces

ANSWER_S = 5.0
"""Seconds that open requests may take to get an error when the server ends."""

AT_ONCE_S = 0.5
"""Seconds that a server may take to end after a second signal."""


SWITCH_S = 0.0005
"""Seconds after which Python makes the engine's thread, or a tokenizer's, hand over the interpreter. The event loop
gives it away with every write to a client; with Python's own 5 ms, 16 writes beside a busy thread took up to 80 ms."""


def make_state(
    engine: AsyncEngine,
    tokenizer: PreTrainedTokenizerBase,
    config: ServerConfig,
    defaults: Mapping[str, Any] | None = None,
) -> ServerState:
    """Make a server's state around an engine that runs.

    Args:
        engine: what runs the requests.
        tokenizer: the model's tokenizer.
        config: how to serve.
        defaults: fields of `SamplingParams` for requests that do not set them.
    """
    spec = engine.model
    name = config.served_model_name or engine.config.model
    return ServerState(
        engine=engine,
        tokenizers=TokenizerPool(tokenizer),
        grammars=LazyGrammars(lambda: make_grammars(copy.deepcopy(tokenizer), spec.vocab_size, spec.eos_token_ids)),
        lengths=Lengths(engine, config.max_model_len),
        config=config,
        metrics=Metrics(name, engine.stats),
        token_texts=TokenTexts(tokenizer),
        parsers=choose_parsers(
            config.tool_call_parser,
            config.reasoning_parser,
            template_text(tokenizer),
            special_names(tokenizer),
            getattr(tokenizer, "response_template", None),
        ),
        marks=marks_of(tokenizer),
        model_name=name,
        sampling_defaults=defaults or {},
        created=int(time.time()),
        traces=_make_traces(config, name),
    )


def _make_traces(config: ServerConfig, model_name: str) -> "Traces | None":
    """Make what sends traces, if the option says so."""
    if config.otlp_endpoint is None:
        return None
    from longspan.server.tracing import Traces  # its packages are optional

    return Traces(config.otlp_endpoint, model_name)


def serve(engine_config: EngineConfig, config: ServerConfig, launcher: Launcher | None) -> int:
    """Serve until a signal comes; return the exit code.

    Args:
        engine_config: what to run, and how.
        config: how to serve it.
        launcher: launcher of ranks that are starting, or None.

    Raises:
        ConfigError: something is illegal, or the port is in use.
        LongspanError: the ranks died.
    """
    sys.setswitchinterval(SWITCH_S)
    collect_new_objects_only()
    if config.served_model_name in engine_config.adapters:
        raise ConfigError(
            f"lora: got an adapter {config.served_model_name!r}, whose name is that of the model (served_model_name), "
            "legal is another one"
        )
    model_config, generation_config = load_config(engine_config.model, engine_config.hf_overrides)
    check_proven(model_config)
    defaults = sampling_defaults(generation_config) if config.generation_config == "auto" else {}
    tokenizer = load_tokenizer(engine_config.model)
    check_draft_tokenizer(engine_config.draft_model, tokenizer)
    use_template_(tokenizer, config.chat_template)
    with Engine(engine_config, launcher=launcher, end_token_ids=tokenizer_end_ids(tokenizer)) as engine:
        check_max_model_len(config.max_model_len, engine.spec.max_position)
        return asyncio.run(_serve(engine, tokenizer, config, defaults))


def http_config(state: ServerState) -> uvicorn.Config:
    """Return uvicorn's settings for a server's state."""
    config = state.config
    return uvicorn.Config(
        make_app(state),
        http=HttpProtocol,
        ws="none",
        proxy_headers=False,
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=config.idle_timeout_s,  # type: ignore[arg-type]  # it counts in seconds, whole or not
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which close the port at once and end by the signal, not with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, config: ServerConfig, defaults: Mapping[str, Any]
) -> int:
    loop = asyncio.get_running_loop()
    failed = asyncio.Event()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for handled in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(handled) is not signal.SIG_IGN:  # else a shell has put this process in the background
            loop.add_signal_handler(handled, signals.put_nowait, handled)

    def on_failure(_error: BaseException) -> None:
        loop.call_soon_threadsafe(failed.set)

    async_engine = AsyncEngine(engine, max_queued_requests=config.max_queued_requests, on_failure=on_failure)
    state = make_state(async_engine, tokenizer, config, defaults)
    listeners = listen(config)
    settings = http_config(state)
    settings.backlog = ACCEPTS  # see `widen`
    server = _Server(settings)
    serving = asyncio.create_task(server.serve(listeners))
    collecting = asyncio.create_task(collect_when_idle(state))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        widen(listeners)
        _say(_capacity(state))
        if state.engine.adapters:
            _say(f"adapters: {', '.join(adapter.name for adapter in state.engine.adapters)}")
        if defaults:
            _say(f"sampling defaults of generation_config.json: {', '.join(f'{k} {v}' for k, v in defaults.items())}")
        scheme = "http" if config.ssl_certfile is None else "https"
        if state.tokenizers.tokenizer.chat_template is not None:
            _say(state.parsers.describe())
        _say(f"ready at {' and '.join(url_of(listener, scheme) for listener in listeners)}")
        number = await _next(signals, failed)
        state.is_draining = True
        if number is not None:
            if state.num_open:
                _say(f"no new requests; {state.num_open} still run (a second signal ends them)")
            number = await _next(signals, failed, state.idle)
        if number is not None:
            _exit_soon(128 + number)
    finally:
        collecting.cancel()
        state.is_draining = True
        await asyncio.to_thread(async_engine.close)  # open requests get an error
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(state.idle.wait(), ANSWER_S)
        server.should_exit = True
        server.force_exit = number is not None  # uvicorn would wait for clients that do not read
        await serving
        close(listeners, config.uds)
        await asyncio.to_thread(state.close)
    if async_engine.failure is not None:
        raise LongspanError(str(async_engine.failure)) from async_engine.failure
    if number is not None:
        os._exit(128 + number)  # all is closed; to take an interpreter with torch down would take another second
    return 0


def _exit_soon(code: int) -> None:
    """End the process in `AT_ONCE_S` seconds, even if a thread still tokenizes or a client does not read.

    Workers that get no message notice that their driver is gone.
    """
    timer = threading.Timer(AT_ONCE_S, os._exit, (code,))
    timer.daemon = True
    timer.start()


async def _next(signals: "asyncio.Queue[int]", *events: asyncio.Event) -> int | None:
    """Return the next signal, or None if one of the events comes first."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(event.wait()) for event in events]
    signalled = asyncio.create_task(signals.get())
    try:
        await asyncio.wait([signalled, *tasks], return_when=asyncio.FIRST_COMPLETED)
        return signalled.result() if signalled.done() else None
    finally:
        for task in (signalled, *tasks):
            task.cancel()


def _capacity(state: ServerState) -> str:
    capacity, longest = state.engine.capacity(), state.lengths.longest_request
    tokens = capacity.tokens_per_rank
    each = tokens[:1] if len(set(tokens)) == 1 else tokens
    return (
        f"model {state.model_name} on {capacity.num_ranks} rank{'s' * (capacity.num_ranks > 1)}: KV for "
        f"{capacity.num_tokens} tokens, {', '.join(map(str, each))} per rank; longest request {longest} tokens, prompt "
        "and answer together"
    )


def _say(text: str) -> None:
    print(f"longspan: {text}", file=sys.stderr, flush=True)
