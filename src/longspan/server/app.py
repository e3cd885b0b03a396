"""The web application: every route, and its handler.

Holds routes. Must not know how requests run.
Read next: `longspan.server.completions`, `longspan.server.chat`; `longspan.server.run`, which starts the server.
"""

from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute, APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from longspan.errors import ConfigError, LongspanError
from longspan.models.detokenizer import encode_prompt
from longspan.server.access_log import AccessLog, record_of
from longspan.server.anthropic import count_tokens, messages
from longspan.server.anthropic_types import CountRequest, MessagesRequest
from longspan.server.bodies import LONG_BODY, kind_of, read_body
from longspan.server.chat import chat
from longspan.server.completions import complete
from longspan.server.errors import ApiError, as_api_error, error_handlers, json_response
from longspan.server.limits import HEALTH_PATH, Gate
from longspan.server.page import add_page_routes
from longspan.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
    pieces_of,
)
from longspan.server.responses import delete_response, respond, stored_response
from longspan.server.responses_types import ResponsesRequest
from longspan.server.sse import unless_gone
from longspan.server.state import ServerState
from longspan.server.templates import Conversation, render
from longspan.server.turns import InTurn
from longspan.types import Adapter

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def _json_route(state: ServerState) -> type[APIRoute]:
    """Make a route class that reads and checks bodies by `read_body` instead of by FastAPI."""

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> _Handler:
            handle, found = super().get_route_handler(), kind_of(self.body_field)
            if found is None:
                return handle
            kind = found

            class JsonRequest(Request):
                async def json(self) -> Any:
                    raw = await self.body()
                    try:
                        if len(raw) < LONG_BODY:
                            return read_body(raw, kind, state)
                        return await state.tokenizers.run(lambda _tokenizer: read_body(raw, kind, state), len(raw))
                    except LongspanError as error:
                        raise as_api_error(error) from None  # FastAPI lets no other exception through

            async def handle_json(request: Request) -> Response:
                return await handle(JsonRequest(request.scope, request.receive))

            return handle_json

    return JsonRoute


class _UnderPath:
    """Middleware that tells routes the path under which a proxy serves them, whether the proxy leaves it in or not."""

    def __init__(self, app: ASGIApp, path: str) -> None:
        self._app, self._path = app, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "root_path": self._path}, receive, send)


def make_app(state: ServerState) -> FastAPI:
    """Make the application around one server's state."""
    app = FastAPI(
        title="longspan",
        version=version("longspan"),
        docs_url=None,  # the pages would load scripts from other hosts
        redoc_url=None,
        exception_handlers=error_handlers(),
        responses={"4XX": {"description": "Refused; see `error`"}, "5XX": {"description": "Failed; see `error`"}},
    )
    app.router.redirect_slashes = False
    app.add_middleware(Gate, state=state)
    if state.config.allowed_origins:  # outside of the gate: a browser's preflight has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=state.config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    if state.traces is not None:
        from longspan.server.tracing import Tracing  # its packages are optional

        app.add_middleware(Tracing, traces=state.traces)
    app.add_middleware(AccessLog, config=state.config)
    app.add_middleware(InTurn)
    if state.config.root_path:
        app.add_middleware(_UnderPath, path=state.config.root_path)
    app.include_router(make_router(state))
    return app


def make_router(state: ServerState) -> APIRouter:
    """Make the router with all routes but that of the application's own description."""
    router = APIRouter(route_class=_json_route(state))
    _add_text_routes(router, state)
    _add_server_routes(router, state)
    if state.config.allow_runtime_lora_updating:
        _add_adapter_routes(router, state)
    if state.config.page:
        add_page_routes(router, state)
    return router


def _add_text_routes(router: APIRouter, state: ServerState) -> None:
    """Add the routes for text and tokens."""

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        state.adapter_of(body.model)  # before anything else
        return await unless_gone(request, complete(state, body, record_of(request)))

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        state.adapter_of(body.model)  # before anything else
        return await unless_gone(request, chat(state, body, record_of(request)))

    @router.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Continue a conversation, in items."""
        state.adapter_of(body.model)  # before anything else
        return await unless_gone(request, respond(state, body, record_of(request)))

    @router.get("/v1/responses/{response_id}")
    async def find_response(response_id: str, request: Request) -> Response:
        """Return a stored response."""
        return stored_response(state, response_id, request)

    @router.delete("/v1/responses/{response_id}")
    async def forget_response(response_id: str) -> Response:
        """Delete a stored response."""
        return delete_response(state, response_id)

    @router.post("/v1/messages")
    async def anthropic_messages(body: MessagesRequest, request: Request) -> Response:
        """Continue a conversation, in Anthropic's words."""
        state.adapter_of(body.model)  # before anything else
        return await unless_gone(request, messages(state, body, record_of(request)))

    @router.post("/v1/messages/count_tokens")
    async def anthropic_count(body: CountRequest, request: Request) -> Response:
        """Count the tokens of a conversation, in Anthropic's words."""
        state.adapter_of(body.model)  # before anything else
        return await unless_gone(request, count_tokens(state, body))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Return the token ids of a text or a conversation."""
        state.adapter_of(body.model)  # before anything else
        return await unless_gone(request, _tokenize(state, body))

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Return the text of token ids, special ones left out."""
        state.adapter_of(body.model)  # before anything else
        return await unless_gone(request, _detokenize(state, body))


def _add_server_routes(router: APIRouter, state: ServerState) -> None:
    """Add the routes about the server itself."""

    @router.get("/v1/models")
    async def models() -> Response:
        """List the model, and the adapters that requests may name in its place."""
        data = [_model(state), *(_adapter(state, adapter) for adapter in state.engine.adapters)]
        return json_response({"object": "list", "data": data})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """Describe the model or an adapter, by name."""
        adapter = state.adapter_of(name)
        return json_response(_model(state) if adapter is None else _adapter(state, adapter))

    @router.head(HEALTH_PATH, include_in_schema=False)
    @router.get(HEALTH_PATH)
    async def health() -> Response:
        """Answer 200 while requests can be served."""
        if state.engine.failure is not None:
            raise ApiError(503, f"the ranks have failed: {state.engine.failure}", code="engine_error")
        if state.engine.is_recovering:
            body = ApiError(503, "the ranks were lost; new ones start, requests wait", code="recovering").body
            return json_response({"status": "recovering", **body}, 503)
        if state.is_draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return json_response({"status": "ok"})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """Describe the tokenizer."""
        return json_response(_tokenizer_info(state))

    @router.get("/metrics")
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(state.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _add_adapter_routes(router: APIRouter, state: ServerState) -> None:
    """Add the routes that load and unload adapters, with vLLM's names."""

    @router.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapterRequest) -> Response:
        """Load a LoRA adapter from a directory on all hosts."""
        if body.lora_name == state.model_name:
            text = f"lora_name: got {body.lora_name!r}, which is the model's name, legal is another one"
            raise ApiError(400, text, param="lora_name")
        await state.engine.load_adapter(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> Response:
        """Let go of a LoRA adapter; requests that run with it go on."""
        try:
            await state.engine.unload_adapter(body.lora_name)
        except ConfigError as error:
            raise ApiError(404, str(error), param="lora_name", code="model_not_found") from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _model(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "longspan",
        "root": state.engine.config.model,
        "max_model_len": state.lengths.longest_request,
    }


def _adapter(state: ServerState, adapter: Adapter) -> dict[str, Any]:
    """Return an adapter in the shape of a model, as vLLM does."""
    return {**_model(state), "id": adapter.name, "root": adapter.directory, "parent": state.model_name}


def _tokenizer_info(state: ServerState) -> dict[str, Any]:
    """Return the tokenizer's class, special tokens and chat template, as far as clients use them."""
    tokenizer = state.tokenizers.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: getattr(tokenizer, name, None) for name in names},
        **{f"{name}_id": getattr(tokenizer, f"{name}_id", None) for name in names},
        "vocab_size": len(tokenizer),
        "model_max_length": state.lengths.longest_request,
        "chat_template": tokenizer.chat_template,
    }


async def _tokenize(state: ServerState, body: TokenizeRequest) -> Response:
    if body.messages is not None:
        conversation = Conversation(
            body.messages,
            tools=body.tools or (),
            variables=body.chat_template_kwargs or {},
            wants_answer=body.add_generation_prompt is not False,
            continues=bool(body.continue_final_message),
            add_special_tokens=body.add_special_tokens is True,
        )
        token_ids = (await render(state, conversation)).token_ids
    else:
        text = body.prompt or ""
        add_special_tokens = body.add_special_tokens is not False

        def encode(tokenizer: PreTrainedTokenizerBase) -> list[int]:
            return encode_prompt(tokenizer, text, add_special_tokens=add_special_tokens)

        token_ids = await state.tokenizers.run(encode, len(text))
    found: dict[str, Any] = {"count": len(token_ids), "max_model_len": state.lengths.longest_request}

    def build(tokenizer: PreTrainedTokenizerBase) -> Response:
        if body.return_token_strs:
            found["token_strs"] = tokenizer.convert_ids_to_tokens(token_ids)
        # In pieces, between which other threads get the interpreter: a million ids take 50 ms.
        pieces = [msgspec.json.encode(piece)[1:-1] for piece in pieces_of(token_ids)]
        return json_response(found | {"tokens": msgspec.Raw(b"[" + b",".join(pieces) + b"]")})

    return await state.tokenizers.run(build, len(token_ids))


async def _detokenize(state: ServerState, body: DetokenizeRequest) -> Response:
    if len(body.tokens) > state.lengths.longest_request:
        state.lengths.refuse("tokens", len(body.tokens), 1)
    if body.tokens:
        await state.check_token_ids("tokens", body.tokens)
    return json_response({"prompt": await state.decode(body.tokens)})
