"""`longspan chat`: the same answers as everywhere, a history, commands, and Ctrl-C that ends an answer only."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from served_command import command
from serving import served_model, serving

from longspan.cli.chat_session import ChatSession
from longspan.cli.progress import Counts, counts_text
from longspan.errors import LongspanError
from longspan.llm import Progress
from longspan.server.config import ServerConfig

COUNTS = Counts(10, 4, 3, 0.5, 1.5)


class Scripted:
    """A model that says how many messages it was sent, and the lines of its user."""

    name = "scripted"

    def __init__(self, *lines, answer=None):
        self.lines, self.seen, self._answer = [*lines], [], answer

    def answer(self, messages, display):
        self.seen.append([(message["role"], message["content"]) for message in messages])
        if self._answer is not None:
            self._answer(display)
        display.progress(Progress(0, 10, 10, 1, 0.5, 0.0, f"answer {len(messages)}"))
        return COUNTS

    def read_line(self):
        if not self.lines:
            return None
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line


def session(**options):
    return ChatSession(**{"system": None, "max_tokens": None, "is_quiet": True, **options})


def run(model, **options):
    session(**options).run(model, model.read_line)
    return model.seen


def test_an_answer_sees_all_messages_before_it(capsys):
    assert run(Scripted("one", "", "two"), system="be kind") == [
        [("system", "be kind"), ("user", "one")],
        [("system", "be kind"), ("user", "one"), ("assistant", "answer 2"), ("user", "two")],
    ]
    assert capsys.readouterr().out == "answer 2\nanswer 4\n"


def test_commands_change_the_conversation(tmp_path, capsys):
    (tmp_path / "text").write_text("a long text")
    lines = (
        "one",
        "/reset",
        f"/file {tmp_path / 'text'}",
        "two",
        "/system new",
        "three",
        "/system",
        "/nothing",
        "four",
    )
    assert run(Scripted(*lines, "/exit", "never")) == [
        [("user", "one")],
        [("user", "a long text\n\ntwo")],
        [("system", "new"), ("user", "three")],
        [("user", "four")],
    ]
    assert "/nothing is no command" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_named_and_the_chat_goes_on(capsys):
    assert run(Scripted("/file /no/such/file", "one")) == [[("user", "one")]]
    assert "'/no/such/file'" in capsys.readouterr().err


def test_an_error_ends_an_answer_and_leaves_the_conversation_as_it_was(capsys):
    def refuse(_display):
        model._answer = None
        raise LongspanError("too long")

    model = Scripted("one", "two", answer=refuse)
    assert run(model) == [[("user", "one")], [("user", "two")]]
    assert "longspan: too long" in capsys.readouterr().err


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(capsys):
    before = signal.getsignal(signal.SIGINT)

    def interrupt(display):
        model._answer = None
        display.progress(Progress(0, 10, 10, 1, 0.5, 0.0, "half an"))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    model = Scripted("one", KeyboardInterrupt, "two", answer=interrupt)
    assert run(model)[1] == [("user", "one"), ("assistant", "half an"), ("user", "two")]
    assert "(stopped)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_the_last_line_has_tokens_times_and_rates(capsys):
    assert counts_text(COUNTS) == (
        "10 prompt tokens (4 cached) in 0.50 s (12 tokens/s); 3 generated in 1.50 s (2.0 tokens/s)"
    )
    assert counts_text(Counts(7, 0, 0, None, 0.25)) == "7 prompt tokens; no token in 0.25 s"
    run(Scripted("one"), is_quiet=False)
    assert counts_text(COUNTS) in capsys.readouterr().err


def test_a_model_and_a_server_give_the_same_answer(longspan):
    path, question = served_model().path, "Tell me something."
    options = ("--executor", "threads", "--system", "be kind", "--max-tokens", "12")
    outcome = longspan("chat", path, *options, stdin=question.encode())
    assert outcome.code == 0, outcome.err
    assert "12 generated in" in outcome.err
    with serving(config=ServerConfig(api_key="sesame")) as server:
        server.http.headers["Authorization"] = "Bearer sesame"
        messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": question}]
        body = server.ok("/v1/chat/completions", messages=messages, temperature=0, max_tokens=12)
        options = ("--system", "be kind", "--max-tokens", "12", "--temperature", "0", "--quiet")
        served = longspan("chat", server.url, "--api-key", "sesame", *options, stdin=question.encode())
        refused = longspan("chat", server.url, "--api-key", "wrong", stdin=b"a")
        path = longspan("chat", f"{server.url}/v1", "--api-key", "sesame", stdin=b"word " * 100_000)
    assert outcome.out == served.out == body["choices"][0]["message"]["content"] + "\n"
    assert (served.code, served.err) == (0, "")
    assert refused.code == 1
    assert "401" in refused.err
    assert path.code == 1
    assert "400: " in path.err


class _BreaksOff(BaseHTTPRequestHandler):
    """A server of another make, which ends in the middle of an answer."""

    def do_GET(self):
        self._send(b'{"data": [{"id": "other"}]}')

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert "return_progress" not in asked  # others may refuse it
        self._send(b'data: {"choices": [{"delta": {"content": "half an"}}]}\n\n')

    def _send(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_stream_that_breaks_off_is_an_error(longspan):
    with HTTPServer(("127.0.0.1", 0), _BreaksOff) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        outcome = longspan("chat", f"http://127.0.0.1:{server.server_port}", stdin=b"Hello")
        server.shutdown()
    assert (outcome.code, outcome.out) == (1, "half an")
    assert "broke off" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("http://127.0.0.1:1", "--page-size", "4"), ("--page-size", "server's address")),
        (("recall", "--api-key", "a"), ("--api-key",)),
        (("recall", "--file", "/no/such/file"), ("/no/such/file",)),
    ],
)
def test_rejects(longspan, arguments, words):
    outcome = longspan("chat", *arguments, stdin=b"Hello")
    assert outcome.code == 2
    message = outcome.err.splitlines()[-1]
    for word in words:
        assert word in message


def test_rejects_a_model_that_is_not_made_for_chats(longspan):
    outcome = longspan("chat", served_model(has_template=False).path, "--executor", "threads", stdin=b"Hello")
    assert outcome.code == 2
    assert "no chat template" in outcome.err


def test_rejects_a_standard_input_without_a_message(longspan):
    with serving() as server:
        assert "empty" in longspan("chat", server.url, stdin=b" \n").err
        assert "byte offset 0" in longspan("chat", server.url, stdin=b"\xff").err


def test_an_address_where_nobody_answers_is_named(longspan):
    outcome = longspan("chat", "http://127.0.0.1:1", stdin=b"Hello")
    assert outcome.code == 1
    assert "127.0.0.1:1" in outcome.err


@pytest.mark.processes
@pytest.mark.parametrize("over_http", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ctrl_c_in_a_terminal_ends_the_answer_and_the_next_one_comes(cache_home, over_http):
    """In a real terminal, where Ctrl-C reaches every process of the foreground."""
    path = served_model().path
    options = ["--context-parallel-size", "2", "--kv-cache-memory", "64Mi"]
    if over_http:
        with command(*options, model=path) as server:
            _talk([server.url, "--max-tokens", "2000", "--ignore-eos", "--temperature", "0"])
    else:
        _talk([path, *options, "--max-tokens", "2000", "--ignore-eos"])


def _talk(arguments):
    main, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "longspan", "chat", *arguments],
        stdin=other, stdout=other, stderr=other, start_new_session=True, preexec_fn=lambda: _take_terminal(other),
    )  # fmt: skip
    os.close(other)
    seen = bytearray()
    killer = threading.Timer(100, process.kill)
    killer.start()
    try:
        at = _until(main, seen, b">>> ", 0)
        os.write(main, b"Tell me a very long story.\n")
        at = _until(main, seen, b"story.\r\n", at)
        while len(seen) < at + 400:  # the bar, and text behind it
            _read(main, seen)
        os.write(main, b"\x03")
        at = _until(main, seen, b"(stopped)", at)
        at = _until(main, seen, b">>> ", at)
        os.write(main, b"/reset\n")
        at = _until(main, seen, b"forgotten", at)
        at = _until(main, seen, b">>> ", at)
        while b"ends the chat)" not in seen[at:]:  # a key just before Python reads is noticed with the next
            os.write(main, b"\x03")
            while select.select([main], [], [], 2)[0]:
                _read(main, seen)
        at = _until(main, seen, b"ends the chat)", at)
        _until(main, seen, b">>> ", at)
        os.write(main, b"\x04")
        assert process.wait(timeout=20) == 0, seen
    finally:
        killer.cancel()
        process.kill()
        process.wait()
        os.close(main)


def _take_terminal(descriptor):
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


def _read(main, seen):
    ready, _, _ = select.select([main], [], [], 60)
    assert ready, bytes(seen)
    try:
        seen += os.read(main, 65536)
    except OSError:
        raise AssertionError(bytes(seen)) from None


def _until(main, seen, mark, start):
    """Read until a mark lies behind `start`; return where it ends."""
    while (found := seen.find(mark, start)) < 0:
        _read(main, seen)
    return found + len(mark)
