"""Clients that mean ill, or are broken: the service goes on serving, in bounded memory."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import gevent
import gevent.socket
import httpx
import psutil
import pytest
from werkzeug.exceptions import RequestTimeout

from api import connections
from api.slots import Budget, Slots
from tests.fixtures.service import HANDSHAKE, MAX_SOCKETS, Socket, submit
from tests.waiting import until
from wicore.errors import RateLimited, Unavailable

pytestmark = pytest.mark.valkey

SOON_S = 2.0
HEAD = (
    "GET {path} HTTP/1.1\r\nHost: localhost\r\n"
    + "".join(f"{k}: {v}\r\n" for k, v in HANDSHAKE.items())
    + "\r\n"
)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 20)


def is_served(http: httpx.Client) -> bool:
    """A client in earnest is answered soon: one that comes now, on a connection of its own."""
    with httpx.Client(base_url=http.base_url, timeout=SOON_S) as newcomer:
        return newcomer.get("/health").status_code == 200


def is_closed(client: socket.socket, within_s: float, *, peek: bool = False) -> bool:
    """Whether the server ends the connection, or with `peek` answers on it."""
    client.settimeout(within_s)
    try:
        return client.recv(1, socket.MSG_PEEK) == b"" or peek
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def drips_in_vain(client: socket.socket, *, peek: bool = False) -> bool:
    """Send one more byte; whether the server has had enough."""
    with suppress(OSError):
        client.sendall(b"a")
    return is_closed(client, 0.2, peek=peek)


def api_bytes() -> int:
    """Memory of the gunicorn that this test run started."""
    ours = psutil.Process().children(recursive=True)
    return sum(child.memory_info().rss for child in ours if "api.wsgi:app" in child.cmdline())


# --- slow requests --------------------------------------------------------------------------------


def test_heads_that_never_end_keep_nobody_out(http: httpx.Client, port: int) -> None:
    with ExitStack() as held:
        slow = [held.enter_context(connect(port)) for _ in range(connections.HEADS + 200)]
        for client in slow:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ")
        assert is_served(http)
        assert is_closed(slow[0], SOON_S), "the first did not give way to the last"
        until(lambda: drips_in_vain(slow[-1]), "a head that comes byte by byte was given up")


@pytest.mark.thorough
def test_bodies_that_never_end_are_given_up(http: httpx.Client, port: int) -> None:
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with connect(port) as client:
        client.sendall(head)
        until(lambda: drips_in_vain(client, peek=True), "a body that comes byte by byte was given up")
        answer = b""
        while not answer.rstrip().endswith(b"}"):  # head and body may come apart
            part = client.recv(1000)
            assert part, answer
            answer += part
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"request_timeout"' in answer
    assert is_served(http)


@pytest.fixture
def pair() -> Iterator[tuple[Any, Any]]:
    ours, theirs = gevent.socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_a_connection_that_gives_way_ends_as_if_its_client_had_left(pair: tuple[Any, Any]) -> None:
    worker = object.__new__(connections.Worker)
    worker._sockets, worker._waiting = {1: pair[0]}, {1: None}
    reader = gevent.spawn(pair[0].recv, 10)
    gevent.sleep(0)  # lets it begin
    worker._dismiss(1)
    assert reader.get(timeout=SOON_S) == b""


def test_a_body_may_take_its_time_if_it_comes_at_the_least_rate(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BODY_GRACE_S", 0.2)
    monkeypatch.setattr(connections, "BODY_BYTES_A_SECOND", 1000)
    ours, theirs = pair
    paced = connections.PacedSocket(ours)
    for _ in range(5):  # 0.5 s in all, and 100 bytes buy each tenth
        theirs.sendall(b"a" * 100)
        assert paced.recv(1000) == b"a" * 100
        gevent.sleep(0.1)

    def drip() -> None:
        for _ in range(100):
            theirs.sendall(b"a")
            paced.recv(1000)
            gevent.sleep(0.05)

    with pytest.raises(RequestTimeout):
        drip()


# --- websockets -----------------------------------------------------------------------------------


def frame(payload: bytes, opcode: int = 1, fin: bool = True, length: int | None = None) -> bytes:
    """A client's frame, RFC 6455 section 5.2, masked with zeros; `length`: what it claims."""
    claimed = len(payload) if length is None else length
    first = (0x80 if fin else 0) | opcode
    if claimed < 126:
        head = struct.pack("!BB", first, 0x80 | claimed)
    elif claimed < 2**16:
        head = struct.pack("!BBH", first, 0x80 | 126, claimed)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, claimed)
    return head + bytes(4) + payload


def open_raw(port: int, path: str = "/v1/stream") -> socket.socket:
    client = connect(port)
    client.sendall(HEAD.format(path=path).encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += client.recv(1000)
    assert answer.startswith(b"HTTP/1.1 101")
    return client


def close_code(client: socket.socket) -> int | None:
    """Of the close frame that ends what the server sends; None when it only hung up."""
    received = b""
    with suppress(ConnectionError):
        while piece := client.recv(65_536):
            received += piece
    at = received.rfind(b"\x88")
    return None if at < 0 else int(struct.unpack("!H", received[at + 2 : at + 4])[0])


MIB = 2**20  # what the service takes, see tests/fixtures/service.py
BAD_FRAMES: dict[str, tuple[bytes, int]] = {
    "larger-than-allowed": (frame(b"a" * (MIB + 1)), 1009),
    "in-many-parts": (frame(b"a" * 1000, fin=False) + frame(b"a" * 1000, 0, fin=False) * 1100, 1009),
    "bad-utf-8": (frame(b'{"type":"\xff\xfe"}'), 1007),
    "half-a-character": (frame(b"\xc3"), 1007),
    "unknown-opcode": (frame(b"a", opcode=3), 1002),
    "long-ping": (frame(b"a" * 200, opcode=9), 1002),
    "continuation-of-nothing": (frame(b"a", opcode=0), 1002),
}


@pytest.mark.parametrize(("data", "code"), BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_a_bad_frame_ends_its_socket_alone(http: httpx.Client, port: int, data: bytes, code: int) -> None:
    with Socket(port, "/v1/stream") as bystander, open_raw(port) as client:
        with suppress(OSError):
            client.sendall(data)
        assert close_code(client) in (code, None)
        bystander.send({"type": "submit", "kind": "completion", "prompt": "a", "max_tokens": 2})
        assert bystander.until_end()[-1]["type"] == "done"
    assert is_served(http)


def test_frames_that_claim_to_be_huge_cost_no_memory(http: httpx.Client, port: int) -> None:
    before = api_bytes()
    with ExitStack() as held:
        for _ in range(15):
            client = held.enter_context(open_raw(port))
            client.sendall(frame(b"a" * 1000, length=2**62))
        assert is_served(http)
        assert api_bytes() - before < 50 * MIB


def test_a_socket_for_reading_that_is_written_to_is_held_back(http: httpx.Client, port: int) -> None:
    job = submit(http, max_tokens=3000, ignore_eos=True)
    before = api_bytes()
    with open_raw(port, f"/v1/jobs/{job}/stream") as client:
        client.setblocking(False)
        unsent, end = b"", time.monotonic() + 1.0
        while time.monotonic() < end:
            unsent = unsent or frame(b"a" * 500) * 100
            with suppress(BlockingIOError):
                unsent = unsent[client.send(unsent) :]
        assert is_served(http)
        assert api_bytes() - before < 50 * MIB
    http.delete(f"/v1/jobs/{job}")


def test_many_that_come_and_go_leave_nothing_behind(http: httpx.Client, port: int) -> None:
    for _ in range(300):
        open_raw(port).close()  # without a closing handshake
    assert is_served(http)
    # All slots, which are fewer, come back.
    with ExitStack() as held:
        for _ in range(MAX_SOCKETS):
            until(lambda: held.enter_context(Socket(port, "/v1/stream")))


# --- what is held ---------------------------------------------------------------------------------


def test_what_arrives_is_bounded_in_all_and_given_back() -> None:
    arriving = Budget(100)
    arriving.change(60)
    arriving.change(40)
    with pytest.raises(Unavailable):
        arriving.change(1)
    arriving.change(-60)
    arriving.change(50)


def refused(take: Callable[[str], None], client: str) -> type[Exception] | None:
    try:
        take(client)
    except (RateLimited, Unavailable) as err:
        return type(err)
    return None


def test_a_client_has_its_share_of_the_streams() -> None:
    slots = Slots(5, 2)
    assert [refused(slots.take, "a") for _ in range(3)] == [None, None, RateLimited]
    assert [refused(slots.take, "") for _ in range(4)] == [None, None, None, Unavailable]
    slots.give("a")
    assert refused(slots.take, "b") is None
