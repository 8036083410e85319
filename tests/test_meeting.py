"""Processes meet before JAX connects them: what is missing or contradictory is named on all of them."""

import contextlib
import re
import socket
import threading

import pytest

from eqvision.meeting import MeetingError, meet


@pytest.fixture
def address():
    return f"localhost:{free_port()}"


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def meet_all(address, who, timeout=5.0):
    """Each (count, id) in a thread; what each raised, by position."""
    found: list[str | None] = [None] * len(who)

    def one(place):
        try:
            meet(address, *who[place], timeout)
        except MeetingError as error:
            found[place] = str(error)

    threads = [threading.Thread(target=one, args=(place,), daemon=True) for place in range(len(who))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def test_all_arrive_in_any_order_and_leave_the_port_free(address):
    for _ in range(2):  # at once again, on the same port
        assert meet_all(address, [(4, 3), (4, 1), (4, 2), (4, 0)]) == [None] * 4
    assert meet_all(address, [(1, 0)]) == [None]


def test_missing_processes_are_named(address):
    (message, told) = meet_all(address, [(4, 0), (4, 2)], timeout=0.5)
    assert message is not None
    assert message.startswith("process 1, 3 of 4 did not come within 0.5 s; check that all were started")
    assert told == message  # the one that came learns it too


def test_a_missing_process_zero_is_named(address):
    (message,) = meet_all(address, [(2, 1)], timeout=0.5)
    assert re.match(
        rf"process 1 did not reach process 0 at --mesh.coordinator {address} within 0.5 s \(.*refused.*\)", message
    )
    (message,) = meet_all("no-such-host.invalid:1234", [(2, 1)], timeout=0.3)
    assert "did not reach process 0 at --mesh.coordinator no-such-host.invalid:1234 within 0.3 s (" in message


def test_an_id_given_twice_is_named_everywhere(address):
    found = meet_all(address, [(4, 0), (4, 1), (4, 1)])
    assert all(message is not None for message in found)
    assert all("--mesh.process-id 1 was given to two processes" in str(message) for message in found)


def test_two_counts_are_named_everywhere(address):
    found = meet_all(address, [(2, 0), (3, 1)])
    expected = "--mesh.num-processes is 2 on process 0 and 3 on process 1"
    assert all(str(message).startswith(expected) for message in found)


def test_a_port_in_use_is_named(address):
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        (message,) = meet_all(address, [(2, 0)])
    assert f"process 0 cannot listen at --mesh.coordinator {address}: " in str(message)
    assert "another process 0?" in str(message)


def test_strangers_are_ignored_and_not_taken_for_process_zero(address):
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as stranger:
        threading.Thread(target=answer, args=(stranger,), daemon=True).start()
        (message,) = meet_all(address, [(2, 1)])
    assert "is not process 0 of this run" in str(message)

    def knock():
        for content in (b"GET / HTTP/1.1\r\n\r\n", b'{"eqvision": 1}\n', b"\xff\n"):
            with connect(address) as connection:
                connection.sendall(content)
        meet(address, 2, 1, 5.0)

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    meet(address, 2, 0, 10.0)
    thread.join(60)
    assert not thread.is_alive()


def answer(server):
    with server.accept()[0] as connection:
        connection.sendall(b"HTTP/1.1 400\r\n\r\n")


def connect(address):
    for _ in range(10_000):  # until the other thread listens
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(address.split(":"), timeout=5)
    raise AssertionError("nothing listens")
