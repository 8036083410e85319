"""A page on which a person clicks on an image and sees the mask that Segment Anything gives.

``GET /`` is the page, ``GET /image`` the image that is set, ``POST /image`` sets another (the bytes of a file), and
``POST /masks`` takes ``{"image": number, "points": [[x, y, label], ...], "box": [x1, y1, x2, y2] or null, "choice":
"auto"}`` and answers ``{"masks": [{"iou": ..., "counts": [...]}, ...], "size": [height, width], "seconds": ...}``.
Coordinates are pixels of the image, counts COCO's run lengths.
"""

import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, get_args

from eqvision.data import CorruptImageError
from eqvision.data.decode import decode_bytes
from eqvision.predict_prompted import Choice, Prompt, masks_of
from eqvision.segmenters.sam import Predictor

HOST = "127.0.0.1"
MOST_BYTES = 64 * 2**20  # of an image file
PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("sam.html", "text/html; charset=utf-8"),
    "/sam.js": ("sam.js", "text/javascript; charset=utf-8"),
    "/sam.css": ("sam.css", "text/css; charset=utf-8"),
}
# Nothing is loaded from elsewhere, and no other page can read answers or hold this one in a frame.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Reply(NamedTuple):
    """What is answered."""

    status: int
    content_type: str
    body: bytes


class RefusedError(Exception):
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Session:
    """The image that is set, and its masks; one request at a time. Each image is encoded once.

    Images are counted, so that prompts for one that has been replaced are refused and not answered wrongly.
    """

    def __init__(self, predictor: Predictor, name: str = "SAM"):
        self.name = name
        self.number = 0
        self._predictor = predictor
        self._lock = threading.Lock()
        self._picture = b""
        self._size = (0, 0)

    def set_image(self, data: bytes, name: str = "the file") -> dict[str, Any]:
        """Decode and encode an image file. Raises CorruptImageError, and keeps the last image then."""
        from PIL import Image

        start, pixels = time.perf_counter(), decode_bytes(data, 3, name=name)
        picture = io.BytesIO()
        Image.fromarray(pixels).save(picture, "PNG", compress_level=1)
        with self._lock:
            self._predictor.set_image(pixels)
            self._picture, self._size = picture.getvalue(), (pixels.shape[0], pixels.shape[1])
            self.number += 1
            return self.describe() | {"seconds": round(time.perf_counter() - start, 3)}

    def describe(self) -> dict[str, Any]:
        """The number of the image (0: none yet), its height and width, and how many points a prompt may have."""
        most = self._predictor.max_points
        return {"model": self.name, "image": self.number, "size": list(self._size), "max_points": most}

    def picture(self) -> bytes:
        """The image as PNG, upright. Raises RefusedError where there is none."""
        if not self.number:
            raise RefusedError(404, "there is no image yet")
        return self._picture

    def masks(self, request: Any) -> dict[str, Any]:
        """The answer to ``POST /masks``. Raises RefusedError, and ValueError for what is no prompt."""
        number, prompt, choice = _parsed(request)
        with self._lock:
            if number != self.number or not self.number:
                raise RefusedError(409, f"image {number} is not the one that is set ({self.number or 'none'})")
            start = time.perf_counter()
            found = masks_of(self._predictor, prompt, choice)
            seconds = round(time.perf_counter() - start, 3)
            rows = [{"iou": round(each.iou, 4), "counts": each.run_lengths.counts.tolist()} for each in found]
            return {"masks": rows, "size": list(self._size), "seconds": seconds}


def _parsed(request: Any) -> tuple[int, Prompt, Choice]:
    """Raises ValueError saying what is wrong."""
    if not isinstance(request, dict):
        raise ValueError(f"expected an object with image, points, box and choice, got {type(request).__name__}")
    choice, box, points = request.get("choice", "auto"), request.get("box"), request.get("points") or []
    if choice not in get_args(Choice):
        raise ValueError(f"choice {choice!r} is unknown; expected one of {', '.join(get_args(Choice))}")
    if not isinstance(points, list) or not all(_numbers(point, 3) for point in points):
        raise ValueError(f"points must be [[x, y, label], ...], got {points!r}")
    if box is not None and not _numbers(box, 4):
        raise ValueError(f"box must be [x1, y1, x2, y2] or null, got {box!r}")
    rows = tuple((float(x), float(y), int(label)) for x, y, label in points)
    corners = None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    return int(request.get("image") or 0), Prompt(rows, corners), choice


def _numbers(value: Any, count: int) -> bool:
    plain = isinstance(value, list) and len(value) == count
    return plain and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)


def sam_server(session: Session, port: int = 0) -> ThreadingHTTPServer:
    """A server of this machine alone, which ``serve_forever`` starts; port 0 takes a free one (``server_port``).

    Raises OSError where the port is taken.
    """

    class Handler(_Handler):
        answers = _answers(session)

    return ThreadingHTTPServer((HOST, port), Handler)


def _answers(session: Session) -> dict[tuple[str, str], Callable[[bytes], Reply]]:
    """By method and path; each takes the body of the request."""
    pages = {("GET", path): _page(*file) for path, file in FILES.items()}
    return {
        **pages,
        ("GET", "/state"): lambda body: _json(session.describe()),
        ("GET", "/image"): lambda body: Reply(200, "image/png", session.picture()),
        ("POST", "/image"): lambda body: _json(session.set_image(body)),
        ("POST", "/masks"): lambda body: _json(session.masks(json.loads(body))),
    }


def _page(name: str, content_type: str) -> Callable[[bytes], Reply]:
    return lambda body: Reply(200, content_type, (PAGE / name).read_bytes())


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(status, "application/json", json.dumps(value).encode())


class _Handler(BaseHTTPRequestHandler):
    """Answers by a table; errors as JSON ``{"error": ...}``."""

    answers: dict[tuple[str, str], Callable[[bytes], Reply]]
    protocol_version = "HTTP/1.1"
    server: ThreadingHTTPServer

    def do_GET(self) -> None:
        self._reply(self._answer())

    def do_POST(self) -> None:
        self._reply(self._answer())

    def _answer(self) -> Reply:
        try:
            self._check_sender()
            body, path = self._body(), self.path.partition("?")[0]
            answer = self.answers.get((self.command, path))
            if answer is None:
                raise RefusedError(404, f"there is no {self.command} {path}")
            return answer(body)
        except RefusedError as error:
            return _json({"error": str(error)}, error.status)
        except (ValueError, CorruptImageError) as error:
            return _json({"error": str(error)}, 400)

    def _check_sender(self) -> None:
        """Pages of other sites are refused, also where their name has been pointed to this machine."""
        own = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in own or (origin is not None and origin.removeprefix("http://") not in own):
            self.close_connection = True
            raise RefusedError(403, "only the page of this server is answered")

    def _body(self) -> bytes:
        if self.command != "POST":
            return b""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.close_connection = True  # what was sent is not read
            status = 413 if length.isdecimal() else 411
            raise RefusedError(status, f"{length or 'no'} bytes announced; at most {MOST_BYTES} are taken")
        return self.rfile.read(int(length))

    def _reply(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in {**HEADERS, "Content-Type": reply.content_type}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal keeps the address."""
