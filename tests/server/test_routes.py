"""No address is new to those who attack the server: each has hostile cases, and a place in the OpenAPI tests."""

import hostile
from serving import serving
from test_server_openapi import ENDLESS, PATHS

from longspan.server.app import make_router


def test_hostile_clients_know_every_route(cache_home):
    with serving() as served:
        found = {(method, route.path) for route in make_router(served.state).routes for method in route.methods}
        described = set(served.http.get("/openapi.json").json()["paths"])
    assert {*found, ("GET", "/openapi.json")} == {*hostile.OTHERS, *(("POST", path) for path in hostile.RIGHT)}
    assert described == {*PATHS, *ENDLESS}


def test_bodies_that_hostile_clients_break_are_served(cache_home):
    with serving() as served:
        for path, bodies in hostile.RIGHT.items():
            for body in bodies:
                served.ok(path, **body)
