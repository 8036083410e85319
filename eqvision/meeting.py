"""Before processes connect through ``jax.distributed``: are they all there, and do they agree on who they are?

JAX ends a process without a Python error where one of them is missing or an id is given twice. So they meet first, by a
line of JSON over TCP at the coordinator's address; the port is free again when JAX takes it.
"""

import json
import socket
import time
from contextlib import suppress
from typing import NamedTuple

RETRY_SECONDS = 0.2
_GREETING = "eqvision"


class MeetingError(RuntimeError):
    """The processes of a run did not find each other in time, or disagree on how many they are or who is who."""


class _Guest(NamedTuple):
    connection: socket.socket
    process_id: int


def meet(address: str, num_processes: int, process_id: int, timeout_seconds: float) -> None:
    """Return when all processes have arrived at ``address`` (HOST:PORT of process 0) within ``timeout_seconds``.

    Raises MeetingError, on every process that can still be reached, with what is wrong and which option to change.
    """
    host, _, port = address.rpartition(":")
    host, deadline = host.strip("[]"), time.monotonic() + timeout_seconds
    if process_id == 0:
        _receive_all(address, int(port), num_processes, deadline, timeout_seconds)
    else:
        _report(address, host, int(port), num_processes, process_id, deadline, timeout_seconds)


def _receive_all(address: str, port: int, num_processes: int, deadline: float, timeout: float) -> None:
    guests: list[_Guest] = []
    try:
        with _listen(address, port) as server:
            while len(guests) < num_processes - 1:
                guests += _next_guest(server, guests, num_processes, deadline, timeout)
    except MeetingError as error:
        _answer_all(guests, str(error))
        raise
    _answer_all(guests, "")


def _listen(address: str, port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise MeetingError(
            f"process 0 cannot listen at --mesh.coordinator {address}: {error.strerror}. Is the port in use, perhaps "
            "by another process 0? Choose another port, the same for all processes"
        ) from error


def _next_guest(
    server: socket.socket, guests: list[_Guest], num_processes: int, deadline: float, timeout: float
) -> list[_Guest]:
    """The next process that introduces itself; none where something else knocked."""
    server.settimeout(max(0.0, deadline - time.monotonic()) or 1e-3)
    try:
        connection, (host, *_) = server.accept()
    except TimeoutError:
        raise MeetingError(_missing(guests, num_processes, timeout)) from None
    said = _read_line(connection, min(deadline, time.monotonic() + 5))
    if said is None or set(said) != {_GREETING, "process", "of"}:
        connection.close()
        return []
    guest = _Guest(connection, said["process"])
    problem = _problem(guest, said["of"], guests, num_processes, host)
    if problem:
        _answer_all([guest], problem)
        raise MeetingError(problem)
    return [guest]


def _missing(guests: list[_Guest], num_processes: int, timeout: float) -> str:
    missing = sorted(set(range(1, num_processes)) - {guest.process_id for guest in guests})
    return (
        f"process {', '.join(map(str, missing))} of {num_processes} did not come within {timeout:g} s; check that all "
        "were started, with the same --mesh.coordinator and --mesh.num-processes, and that its port can be reached"
    )


def _problem(guest: _Guest, of: int, guests: list[_Guest], num_processes: int, host: str) -> str:
    if of != num_processes:
        return (
            f"--mesh.num-processes is {num_processes} on process 0 and {of} on process {guest.process_id} ({host}); "
            "it must be the same on all"
        )
    if any(guest.process_id == other.process_id for other in guests):
        return f"--mesh.process-id {guest.process_id} was given to two processes, the second on {host}"
    return ""


def _answer_all(guests: list[_Guest], problem: str) -> None:
    for guest in guests:
        with suppress(OSError), guest.connection as connection:  # one that has gone will be missed by JAX
            _send_line(connection, {_GREETING: problem})
            # The guest closes first, so that the port is not kept in waiting on this side.
            connection.settimeout(5)
            connection.recv(1)


def _report(
    address: str, host: str, port: int, num_processes: int, process_id: int, deadline: float, timeout: float
) -> None:
    with _connect(address, host, port, process_id, deadline, timeout) as connection:
        _send_line(connection, {_GREETING: 1, "process": process_id, "of": num_processes})
        said = _read_line(connection, deadline + 5)  # process 0 gives up first, and says why
    if said is None or set(said) != {_GREETING}:
        raise MeetingError(
            f"what answers process {process_id} at --mesh.coordinator {address} is not process 0 of this run, or it "
            "ended before all had come; see its output, or choose another port"
        )
    if said[_GREETING]:
        raise MeetingError(said[_GREETING])


def _connect(address: str, host: str, port: int, process_id: int, deadline: float, timeout: float) -> socket.socket:
    """Try until the deadline: process 0 may start last, and its name may not be known yet."""
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(1e-3, deadline - time.monotonic()))
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise MeetingError(
                    f"process {process_id} did not reach process 0 at --mesh.coordinator {address} within {timeout:g} s"
                    f" ({error.strerror or error}); check the host and port, and that process 0 runs there"
                ) from error
            time.sleep(RETRY_SECONDS)


def _send_line(connection: socket.socket, content: dict) -> None:
    connection.sendall(json.dumps(content).encode() + b"\n")


def _read_line(connection: socket.socket, deadline: float) -> dict | None:
    """One line of JSON; None where the other side sends something else, nothing, or ends."""
    connection.settimeout(max(1e-3, deadline - time.monotonic()))
    try:
        with connection.makefile("rb") as lines:
            said = json.loads(lines.readline(4096))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and _GREETING in said else None
