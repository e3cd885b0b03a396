"""Options of the server, checked once.

Holds values and their legal ranges. Must not import what a server needs: `longspan serve --help` answers at once.
Read next: `longspan.cli.serve`, which sets these; `longspan.server.run`, which uses them.
"""

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
