"""``eqvision demo sam``: a page on this machine on which a person clicks on an image and sees the mask."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eqvision.commands.arguments import parse

MOST_POINTS = 16  # of a prompt


@dataclass(frozen=True)
class DemoOptions:
    """A page on this machine: click on an image, and see the mask. Nothing is loaded from elsewhere or sent away."""

    what: Annotated[tyro.conf.Positional[Literal["sam"]], tyro.conf.arg(metavar="sam")]
    """Which page."""
    model: str = "sam_vit_b"
    """Name of the zoo: eqvision list --kind prompted."""
    weights: str | None = None
    """File or folder of weights, hf:organisation/repository, a URL, or a tag that `eqvision info MODEL` lists; default
    is the first of those."""
    layout: str | None = None
    """Names of the tensors in the file, where they do not tell it."""
    image: Path | None = None
    """Image to begin with; others are chosen on the page."""
    port: int = 0
    """Port of the page; 0 takes a free one."""


def run(arguments: list[str]) -> None:
    options = parse(DemoOptions, arguments, "eqvision demo")
    from eqvision.demo import Session, sam_server
    from eqvision.predict import require_file
    from eqvision.predict_prompted import load_predictor

    if options.image is not None:
        require_file(options.image)
    predictor = load_predictor(options.model, options.weights, layout=options.layout, max_points=MOST_POINTS)
    session = Session(predictor, options.model)
    server = sam_server(session, options.port)
    if options.image is not None:
        session.set_image(options.image.read_bytes(), str(options.image))
    print(f"{options.model} at http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass  # how it is meant to end
    finally:
        server.server_close()
