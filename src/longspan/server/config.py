"""Options of the server, checked once.

Holds values and their legal ranges. Must not import what a server needs: `longspan serve --help` answers at once.
Read next: `longspan.cli.serve`, which sets these; `longspan.server.run`, which uses them.
"""

import os
import re
import ssl
from importlib.util import find_spec
from typing import Annotated, Literal

import msgspec

from longspan.errors import ConfigError
from longspan.option import Group, Option, check_options
from longspan.quantities import MAX_COUNT, parse_size


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Address, API key and limits of a server.

    Raises:
        ConfigError: a value is illegal.
    """

    host: Annotated[str, Option("Address to listen on; 0.0.0.0 is everywhere.", Group.SERVER)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every IPv4 address of this machine."""
    port: Annotated[int, Option("Port to listen on; 0 takes a free one.", Group.SERVER, least=0, most=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: Annotated[
        str | None,
        Option(
            "Clients must send it; better in LONGSPAN_API_KEY. White space around it is dropped.",
            Group.SERVER,
            envvar="LONGSPAN_API_KEY",
        ),
    ] = None
    """Key that clients must send as `Authorization: Bearer KEY`, except to /health; None asks for nothing.

    White space around it is dropped.
    """
    served_model_name: Annotated[
        str | None, Option("What clients call the model.", Group.SERVER, metavar="NAME", unset="MODEL")
    ] = None
    """Name that clients call the model by; None is the name it was loaded by."""
    generation_config: Annotated[
        Literal["auto", "none"],
        Option("Sampling defaults of requests; auto: those in the model's generation_config.json.", Group.SERVER),
    ] = "auto"
    """Source of sampling parameters that a request leaves out. `auto` takes temperature, top_p, top_k, min_p and
    repetition_penalty from the model's generation config where it sets them, and max_new_tokens as the number of tokens
    of a chat that asks for no number; `none` takes the defaults of OpenAI's API."""
    max_model_len: Annotated[
        int | None,
        Option(
            "Most tokens of a request, prompt and answer together.",
            Group.SERVER,
            least=1,
            most=MAX_COUNT,
            unset="what the model admits",
        ),
    ] = None
    """Most tokens of a request, prompt and answer together; None is what the model admits."""
    max_queued_requests: Annotated[
        int | None,
        Option(
            "Beside those that run; more are answered 429.", Group.SERVER, least=1, most=MAX_COUNT, unset="any number"
        ),
    ] = None
    """Most requests that wait, beside `max_num_seqs` that run; one more is answered 429. None queues any number."""
    max_body_bytes: Annotated[
        int,
        Option(
            "Longest request body.",
            Group.SERVER,
            least=1,
            most=2**63 - 1,
            metavar="SIZE",
            parse=parse_size,
            flag="max-body-size",
        ),
    ] = 32 * 2**20
    """Longest request body; a longer one is answered 413."""
    chat_template: Annotated[
        str | None,
        Option(
            "Chat template: a file, its text, or the name of one of the model's own.",
            Group.SERVER,
            metavar="FILE|TEXT|NAME",
            unset="the model's own",
        ),
    ] = None
    """Chat template in place of the model's own: a file, the text of one, or the name of one of several that the model
    has."""
    tool_call_parser: Annotated[
        Literal["auto", "harmony", "qwen_xml", "deepseek", "mistral", "llama3_json", "hermes"],
        Option("Format in which the model writes calls; auto: that of its chat template.", Group.SERVER),
    ] = "auto"
    """Format in which the model writes calls of tools. `auto` is that of its chat template, and hermes where that knows
    no tools."""
    reasoning_parser: Annotated[
        Literal["auto", "none", "think", "mistral", "harmony"],
        Option("Marks of what the model thinks; none: thoughts are text.", Group.SERVER),
    ] = "auto"
    """Marks between which the model thinks before it answers. `auto` is what its chat template has; with `none`
    thoughts are part of the text."""
    root_path: Annotated[str, Option("Path under which a proxy serves this server.", Group.SERVER, metavar="PATH")] = ""
    """Path under which a proxy serves this server, such as `/llm`; requests are answered with it and without it."""
    ssl_certfile: Annotated[
        str | None,
        Option("Certificate of HTTPS; needs --ssl-keyfile.", Group.SERVER, metavar="FILE", unset="plain HTTP"),
    ] = None
    """PEM file with the certificate chain of HTTPS; None serves plain HTTP."""
    ssl_keyfile: Annotated[str | None, Option("Private key of the certificate.", Group.SERVER, metavar="FILE")] = None
    """PEM file with the private key of the certificate, without a password."""
    uds: Annotated[
        str | None,
        Option("Unix socket to listen on, instead of host and port.", Group.SERVER, metavar="PATH"),
    ] = None
    """Path of a Unix socket to listen on, in place of host and port."""
    allowed_origins: Annotated[
        tuple[str, ...],
        Option(
            "Web page that may call, such as https://chat.example.org, or *; may be given several times.",
            Group.SERVER,
            metavar="ORIGIN",
        ),
    ] = ()
    """Origins of web pages whose scripts may call this server (CORS); `*` admits all, none is the default."""
    idle_timeout_s: Annotated[
        float,
        Option("Silence after which an idle connection is closed.", Group.SERVER, above=0, most=86400, note="seconds"),
    ] = 75.0
    """Seconds after which a connection without a request is closed. It must exceed the time that a proxy in front keeps
    its connections (60 s is usual), or the proxy sends requests into connections that are being closed."""
    unknown_fields: Annotated[
        Literal["refuse", "warn"],
        Option("What becomes of fields that the server does not know; warn says so once and drops them.", Group.SERVER),
    ] = "refuse"
    """What becomes of a request with fields that nobody knows here: `refuse` answers 400 and names them all, `warn`
    drops them, and names each on standard error once. Fields that are known and not supported are always refused."""
    clamp_max_tokens: Annotated[
        bool, Option("Cut max_tokens down to what fits, instead of refusing the request.", Group.SERVER)
    ] = False
    """Whether `max_tokens` that do not fit behind the prompt are cut down to what fits; else the request is refused."""
    allow_runtime_lora_updating: Annotated[
        bool, Option("Routes that load and unload LoRA adapters from this machine's directories.", Group.SERVER)
    ] = False
    """Whether `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` are there, as with vLLM's variable
    VLLM_ALLOW_RUNTIME_LORA_UPDATING. Whoever may send requests may then have any directory of an adapter read, so set
    an API key."""
    page: Annotated[bool, Option("A page at / that shows what the server is doing, and chats.", Group.SERVER)] = True
    """Whether `/` is a page that shows what the server is doing, fed by `/live`; behind the API key like the rest."""
    access_log: Annotated[bool, Option("One line per request on standard error.", Group.SERVER)] = False
    """Whether every request, also a refused one, leaves one line on standard error."""
    log_format: Annotated[Literal["text", "json"], Option("Form of the lines of --access-log.", Group.SERVER)] = "text"
    """Form of the lines of `access_log`."""
    otlp_endpoint: Annotated[
        str | None,
        Option(
            "OpenTelemetry collector for traces, such as http://localhost:4318.",
            Group.SERVER,
            metavar="URL",
            unset="no traces",
        ),
    ] = None
    """Address of an OpenTelemetry collector, to which a span per request is sent, by OTLP over HTTP. Without a path it
    is completed by `/v1/traces`. Needs the extra `otlp`."""
    keep_alive_s: Annotated[
        float, Option("Silence after which a stream sends a comment.", Group.SERVER, above=0, most=3600, note="seconds")
    ] = 5.0
    """Seconds of silence after which a streaming response sends a comment."""

    def __post_init__(self) -> None:
        if self.api_key is not None:  # a key from a file often ends with a line break, which no header can hold
            msgspec.structs.force_setattr(self, "api_key", self.api_key.strip())
        check_options(self)
        if not isinstance(self.host, str) or not self.host.strip():
            raise ConfigError(f"host: got {self.host!r}, legal is a host name or an address")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise ConfigError("api_key: got a key that is empty or not ASCII, legal is ASCII text")
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise ConfigError(f"served_model_name: got {self.served_model_name!r}, legal is a name that is not empty")
        self._check_place()
        self._check_origins()
        self._check_endpoint()

    def _check_place(self) -> None:
        if self.root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.root_path):
            raise ConfigError(f"root_path: got {self.root_path!r}, legal is a path such as /llm")
        if self.uds is not None and (not self.uds or len(os.fsencode(self.uds)) > MAX_UDS_BYTES):
            raise ConfigError(f"uds: got {self.uds!r}, legal is a path of 1 to {MAX_UDS_BYTES} bytes")
        given = {name: getattr(self, name) for name in ("ssl_certfile", "ssl_keyfile")}
        for name, path in given.items():
            if path is not None:
                _check_readable(name, path)
        for name, path in given.items():
            if path is None and any(given.values()):
                raise ConfigError(f"{name}: got none, legal with the other of {' and '.join(given)} is a PEM file")
        if self.ssl_certfile is not None and self.ssl_keyfile is not None:
            check_certificate(self.ssl_certfile, self.ssl_keyfile)

    def _check_origins(self) -> None:
        if isinstance(self.allowed_origins, list):
            msgspec.structs.force_setattr(self, "allowed_origins", tuple(self.allowed_origins))
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s,]+", origin):
                raise ConfigError(
                    f"allowed_origins: got {origin!r}, legal is * or an origin such as https://chat.example.org"
                )

    def _check_endpoint(self) -> None:
        if self.otlp_endpoint is None:
            return
        host = r"(?:\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]]+)"
        found = re.fullmatch(rf"(https?://{host}(?::\d{{1,5}})?)(/[^\s?#]*)?", self.otlp_endpoint)
        if found is None:
            raise ConfigError(
                f"otlp_endpoint: got {self.otlp_endpoint!r}, legal is an address such as http://localhost:4318"
            )
        if not _has_otlp():
            raise ConfigError(
                f"otlp_endpoint: got {self.otlp_endpoint!r}, legal is none without OpenTelemetry: pip install "
                "'longspan[otlp]'"
            )
        path = found[2] if found[2] not in (None, "/") else "/v1/traces"
        msgspec.structs.force_setattr(self, "otlp_endpoint", found[1] + path)


def _has_otlp() -> bool:
    """Whether what sends traces is installed."""
    try:
        names = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
        return all(find_spec(name) is not None for name in names)
    except ModuleNotFoundError:  # a package around it
        return False


MAX_UDS_BYTES = 107
"""Most bytes in the path of a Unix socket, by Linux."""


def _check_readable(name: str, path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{name}: got {path!r}, legal is a file that can be read: {error.strerror}") from None


def check_certificate(certfile: str, keyfile: str) -> None:
    """Refuse a file that is no certificate or key, and a key of another certificate.

    Raises:
        ConfigError: names the file.
    """

    def refuse_password() -> str:
        raise ConfigError(f"ssl_keyfile: got {keyfile!r} with a password, legal is a key without one")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, refuse_password)
    except ssl.SSLError as error:
        raise ConfigError(
            f"ssl_certfile: got {certfile!r} with {keyfile!r}, legal is a PEM certificate and its key: {error.reason}"
        ) from None
