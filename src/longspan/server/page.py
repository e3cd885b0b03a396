"""The page at `/`: its files, and the headers that keep other hosts out.

Holds the routes of the page and of its events. The files are package data in `page_files`, plain HTML, CSS and
JavaScript; what they may load is this server's alone. Must not know what events say.
Read next: `longspan.server.live`, the events; `page_files/main.js`, where the page begins.
"""

from functools import cache
from importlib.resources import files

from fastapi import Response
from fastapi.routing import APIRouter

from longspan.server.errors import ApiError
from longspan.server.live import LiveFeed
from longspan.server.sse import EventStream
from longspan.server.state import ServerState

LIVE_PATH, FILES_PATH = "/live", "/page"

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Media types of the page's files."""

HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; frame-ancestors 'none'; "
    "form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def is_of_page(path: str) -> bool:
    """Whether a path is of the page, so that a browser should ask its user for the key."""
    return path in ("/", LIVE_PATH) or path.startswith(f"{FILES_PATH}/")


def add_page_routes(router: APIRouter, state: ServerState) -> None:
    """Add the routes of the page."""
    feed = LiveFeed(state)

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        """Return the page."""
        return _file("index.html", state.config.root_path)

    @router.get(FILES_PATH + "/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        """Return a file of the page."""
        return _file(name)

    @router.get(LIVE_PATH)
    async def live() -> Response:
        """Stream the state of the server, twice a second, as server-sent events."""
        return EventStream(feed.events(), lambda: None)


def _file(name: str, root_path: str = "") -> Response:
    known = _files()
    if name not in known:
        raise ApiError(404, f"no such address: {FILES_PATH}/{name}")
    kind = KINDS[name[name.rindex(".") :]]
    body = known[name]
    if name == "index.html":  # addresses in the page are relative to it, also behind a proxy
        body = body.replace(b'<base href="/">', f'<base href="{root_path}/">'.encode())
    return Response(body, headers={**HEADERS, "Content-Type": f"{kind}; charset=utf-8"})


@cache
def _files() -> dict[str, bytes]:
    """Contents of the page's files by name."""
    folder = files("longspan.server") / "page_files"
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.name.endswith(tuple(KINDS))}
