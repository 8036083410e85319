"""The page on which a person clicks: its server over HTTP, and the page in a real browser."""

import io
import json
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

import browser
import numpy as np
import pytest
import sam_references as source
from PIL import Image

from eqvision import cli
from eqvision.commands import demo
from eqvision.data.detection import UncompressedRLE, decode_mask
from eqvision.demo import Session, sam_server
from eqvision.pretrained import LAYOUTS, to_layout
from eqvision.segmenters.sam import PredictedMasks, Predictor
from eqvision.zoo import PROMPTED

RADIUS = 20


class Discs(Predictor):
    """Without a model: discs around points inside, without those around points outside, or the box."""

    def __init__(self):
        self.max_points, self.images, self.size = 4, [], (0, 0)

    def set_image(self, image):
        self.images.append(image)
        self.size = image.shape[:2]

    def predict(self, points=None, labels=None, boxes=None, masks=None, *, multimask=True, threshold=0.0):
        y, x = np.mgrid[: self.size[0], : self.size[1]]
        mask = np.zeros(self.size, bool)
        if boxes is not None:
            x1, y1, x2, y2 = boxes[0]
            mask |= (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
        for (px, py), label in [] if points is None else zip(points[0], labels[0], strict=True):
            if not (0 <= px <= self.size[1] and 0 <= py <= self.size[0]):
                raise ValueError(f"the point {px, py} is outside the image")
            disc = (x - px) ** 2 + (y - py) ** 2 < RADIUS**2
            mask = mask | disc if label else mask & ~disc
        several = np.stack([mask, ~mask, mask | True]) if multimask else mask[None]
        iou = np.array([[0.9, 0.3, 0.5]], np.float32)[:, : len(several)]
        return PredictedMasks(several[None], iou, np.zeros((1, len(several), 4, 4), np.float32))


@pytest.fixture
def served():
    """A function that serves a session, and gives its address."""
    running = []

    def serve(session):
        server = sam_server(session)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def picture(height=60, width=100, kind="PNG", **options):
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return image, file.getvalue()


def call(address, body=None, **headers):
    """(status, headers, bytes) of a GET, or of a POST where there is a body."""
    data = json.dumps(body).encode() if isinstance(body, dict | list) else body
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=60) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def answer(address, body=None):
    status, _, data = call(address, body)
    assert status == 200, data
    return json.loads(data)


def masks(reply):
    rows = [UncompressedRLE(tuple(reply["size"]), np.array(row["counts"])) for row in reply["masks"]]
    return [decode_mask(row, *row.size) for row in rows]


# Over HTTP


def test_an_image_and_prompts(served):
    predictor = Discs()
    address = served(Session(predictor, "discs"))
    assert answer(f"{address}/state") == {"model": "discs", "image": 0, "size": [0, 0], "max_points": 4}
    image, data = picture()
    state = answer(f"{address}/image", data)
    assert (state["image"], state["size"]) == (1, [60, 100])
    status, headers, shown = call(f"{address}/image?1")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown))), image)
    click = answer(f"{address}/masks", {"image": 1, "points": [[50, 30, 1]]})
    assert [row["iou"] for row in click["masks"]] == [0.9, 0.5, 0.3]
    assert masks(click)[0][30, 50]
    assert not masks(click)[0][30, 75]
    both = answer(f"{address}/masks", {"image": 1, "points": [[50, 30, 1], [65, 30, 0]], "box": None})
    assert len(both["masks"]) == 1
    assert not masks(both)[0][30, 60]
    box = answer(f"{address}/masks", {"image": 1, "box": [10, 20, 40, 50], "choice": "three"})
    assert len(box["masks"]) == 3
    assert masks(box)[0].sum() == 30 * 30
    assert len(predictor.images) == 1  # encoded once for all prompts
    assert np.array_equal(predictor.images[0], image)
    other, data = picture(40, 30)
    assert answer(f"{address}/image", data)["image"] == 2
    assert np.array_equal(predictor.images[1], other)
    status, _, error = call(f"{address}/masks", {"image": 1, "points": [[5, 3, 1]]})
    assert (status, json.loads(error)["error"]) == (409, "image 1 is not the one that is set (2)")


def test_photographs_are_turned_upright(served):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    address = served(Session(Discs()))
    assert answer(f"{address}/image", picture(20, 50, "JPEG", exif=exif)[1])["size"] == [50, 20]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/masks", {"image": 1}, 400, "no prompt: give points"),
        ("/masks", {"image": 1, "points": [[1, 2, 5]]}, 400, "label 5; expected 1 inside the object or 0 outside"),
        ("/masks", {"image": 1, "points": [[500, 2, 1]]}, 400, "outside the image"),
        ("/masks", {"image": 1, "points": [[1, 2]]}, 400, "points must be [[x, y, label], ...], got [[1, 2]]"),
        ("/masks", {"image": 1, "box": [1, 2, "3", 4]}, 400, "box must be [x1, y1, x2, y2] or null"),
        ("/masks", {"image": 1, "box": [1, 2, 3, 4], "choice": "two"}, 400, "choice 'two' is unknown"),
        ("/masks", {"image": 7, "box": [1, 2, 3, 4]}, 409, "image 7 is not the one that is set (1)"),
        ("/masks", [], 400, "expected an object with image, points, box and choice, got list"),
        ("/masks", b"{", 400, "Expecting property name"),
        ("/image", b"no image", 400, "corrupt image"),
        ("/nothing", None, 404, "there is no GET /nothing"),
        ("/../sam.py", None, 404, "there is no GET"),
    ],
)
def test_refused_requests(served, path, body, status, message):
    session = Session(Discs())
    session.set_image(picture()[1])
    got, _, data = call(served(session) + path, body)
    assert (got, message in json.loads(data)["error"]) == (status, True), data
    assert session.number == 1


def test_only_the_own_page_is_answered(served):
    session = Session(Discs())
    address = served(session)
    port = address.rpartition(":")[2]
    assert call(f"{address}/image")[0] == 404
    for headers in ({"Host": f"evil.example:{port}"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        assert call(f"{address}/state", **headers)[0] == 403
        assert call(f"{address}/image", picture()[1], **headers)[0] == 403
    assert call(f"{address}/state", Origin=f"http://localhost:{port}", Host=f"localhost:{port}")[0] == 200
    assert call(f"{address}/image", b"", **{"Content-Length": str(2**40)})[0] == 413
    assert session.number == 0


def test_the_page_loads_nothing_from_elsewhere(served):
    address = served(Session(Discs()))
    for path, kind in (("/", "text/html"), ("/sam.js", "text/javascript"), ("/sam.css", "text/css")):
        status, headers, data = call(address + path)
        assert (status, headers["Content-Type"].partition(";")[0]) == (200, kind)
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert b"//" not in data.replace(b"// ", b"").replace(b"://", b"//") or path == "/sam.js"
        assert b"http" not in data


# The command


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with an image, weights, and their model among the zoo's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PROMPTED, "toy_sam", source.toy_sam)
    np.savez("sam.npz", **to_layout(source.noisy_sam(), source.STATE, LAYOUTS["official_sam"]))
    Path("photo.png").write_bytes(picture()[1])


def test_refused_commands(toy, capsys):
    for arguments, message in (
        (["--model", "toy_sam", "--weights", "sam.npz", "--image", "gone.png"], "no image file at"),
        (["--model", "resnet18"], "model 'resnet18' takes no prompts"),
        (["--model", "toy_sam", "--weights", "gone.npz"], "no weights at"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["demo", "sam", *arguments])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_a_model(toy, capsys, monkeypatch):
    seen = []

    def use(server, poll_interval=0.5):
        """In the place of ``serve_forever``: one request of each kind, and Ctrl-C."""
        address = f"http://127.0.0.1:{server.server_port}"
        requests = (("/state", None), ("/masks", {"image": 1, "points": [[50, 30, 1]]}))
        thread = threading.Thread(target=lambda: seen.extend(answer(address + path, body) for path, body in requests))
        thread.start()
        for _ in requests:
            server.handle_request()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", use)
    cli.main(["demo", "sam", "--model", "toy_sam", "--weights", "sam.npz", "--image", "photo.png"])
    assert "toy_sam at http://127.0.0.1:" in capsys.readouterr().out
    predictor = Predictor(source.noisy_sam(), source.STATE, prompts_per_batch=1, max_points=demo.MOST_POINTS)
    predictor.set_image(picture()[0])
    expected = predictor.predict(np.array([[[50.0, 30]]]), np.array([[1]]))
    order = np.argsort(-expected.iou[0])
    assert seen[0]["model"] == "toy_sam"
    for mask, place in zip(masks(seen[1]), order, strict=True):
        assert np.array_equal(mask != 0, expected.masks[0, place])


# In a browser

SEEN = """
const data = document.getElementById("canvas").getContext("2d").getImageData(arguments[0], arguments[1], 1, 1).data;
return Array.from(data).slice(0, 3);
"""
PLACE = "const r = document.getElementById('canvas').getBoundingClientRect(); return [r.left, r.top, r.width];"


@pytest.mark.slow
@pytest.mark.skipif(not browser.is_installed(), reason="needs Debian's chromium and chromium-driver")
def test_a_person_clicks(served, tmp_path):
    predictor = Discs()
    session = Session(predictor, "discs")
    grey = np.full((300, 400, 3), 100, np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey[:200, :200] + 50).save(tmp_path / "other.png")
    session.set_image((tmp_path / "grey.png").read_bytes())
    with browser.Browser() as page:
        page.open(served(session))
        page.wait(lambda: page.script("return document.getElementById('canvas').width") == 400)
        left, top, width = page.script(PLACE)
        scale = width / 400

        def at(x, y):
            return round(left + x * scale), round(top + y * scale)

        def count():
            return page.script("return document.querySelectorAll('#masks li').length")

        def status():
            return page.script("return document.getElementById('status').textContent")

        page.press(at(200, 150))
        page.wait(lambda: count() == 3)
        assert page.script(SEEN, 212, 150) != [100, 100, 100]
        assert page.script(SEEN, 240, 150) == [100, 100, 100]
        page.press(at(215, 150), shift=True)
        page.wait(lambda: count() == 1)
        assert page.script(SEEN, 205, 165) == [100, 100, 100]
        page.press(at(190, 150), button=2)
        page.wait(lambda: page.script(SEEN, 200, 135) == [100, 100, 100])
        page.click("#clear")
        page.wait(lambda: count() == 0)
        page.press(at(50, 60), at(150, 160))
        page.wait(lambda: count() == 1)
        assert page.script(SEEN, 100, 110) != [100, 100, 100]
        assert page.script(SEEN, 200, 150) == [100, 100, 100]
        if "EQVISION_SCREENSHOTS" in os.environ:
            Path(os.environ["EQVISION_SCREENSHOTS"], "sam_box.png").write_bytes(page.screenshot())
        page.click("#undo")
        page.wait(lambda: count() == 0 and page.script(SEEN, 100, 110) == [100, 100, 100])
        page.type("#file", str(tmp_path / "other.png"))
        page.wait(lambda: "200 x 200 pixels" in status())
        assert page.script(SEEN, 100, 110) == [150, 150, 150]
        (tmp_path / "text.png").write_text("no image")
        page.type("#file", str(tmp_path / "text.png"))
        page.wait(lambda: "corrupt image" in status())
    assert len(predictor.images) == 2
