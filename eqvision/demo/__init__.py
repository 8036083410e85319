"""Pages on this machine, served by Python's own server, that show what a model does."""

from eqvision.demo.sam import Session, sam_server

__all__ = ["Session", "sam_server"]
