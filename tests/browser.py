"""A real browser for tests: Debian's ``chromium`` and ``chromium-driver``, spoken to by WebDriver's plain JSON."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's name for a reference
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1000,700")


def is_installed() -> bool:
    return bool(shutil.which("chromedriver") and shutil.which("chromium"))


class Browser:
    """One window; a context manager that ends the browser."""

    def __enter__(self) -> "Browser":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["chromedriver", f"--port={port}", "--log-level=OFF"]
        self._driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._address = f"http://127.0.0.1:{port}"
        try:
            self.wait(self._is_up, 60)
            wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": OPTIONS}}
            session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._driver.kill()
            raise
        self._address += f"/session/{session['sessionId']}"
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._send("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(30)

    def _is_up(self) -> bool:
        try:
            return self._send("GET", "/status")["ready"]
        except OSError:
            return False

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None and method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.loads(reply.read())["value"]

    def wait(self, ready: Any, seconds: float = 60) -> Any:
        """What ``ready()`` gives as soon as it is true; fails after ``seconds``."""
        end = time.monotonic() + seconds
        while True:
            answer = ready()
            if answer:
                return answer
            assert time.monotonic() < end, f"waited {seconds} s in vain"
            time.sleep(0.05)

    def open(self, address: str) -> None:
        self._send("POST", "/url", {"url": address})

    def script(self, code: str, *arguments: Any) -> Any:
        """What a function with this body returns in the page."""
        return self._send("POST", "/execute/sync", {"script": code, "args": list(arguments)})

    def element(self, selector: str) -> str:
        return self._send("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self._send("POST", f"/element/{self.element(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Keys; into a file input, the path of a file."""
        self._send("POST", f"/element/{self.element(selector)}/value", {"text": text})

    def press(
        self, start: tuple[int, int], end: tuple[int, int] | None = None, *, button: int = 0, shift: bool = False
    ):
        """The mouse at a place of the window, and to ``end`` while it is held."""
        moves = [{"type": "pointerMove", "duration": 0, "x": x, "y": y} for x, y in (start, end or start)]
        down, up = ({"type": f"pointer{kind}", "button": button} for kind in ("Down", "Up"))
        mouse = {"type": "pointer", "id": "mouse", "actions": [moves[0], down, moves[1], up]}
        keys = {"type": "key", "id": "keys", "actions": []}
        if shift:
            pause, key = {"type": "pause", "duration": 0}, "\ue008"
            keys["actions"] = [{"type": "keyDown", "value": key}, pause, pause, pause, {"type": "keyUp", "value": key}]
            mouse["actions"] = [moves[0], {"type": "pause", "duration": 0}, down, up]
        self._send("POST", "/actions", {"actions": [mouse, keys]})

    def screenshot(self) -> bytes:
        """PNG."""
        return base64.b64decode(self._send("GET", "/screenshot"))
