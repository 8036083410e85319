"""Checkpoints: one folder per step, written whole or not at all, with a digest of every leaf."""

from eqvision.checkpoint.digest import digests
from eqvision.checkpoint.inspect import describe_checkpoint
from eqvision.checkpoint.manager import Checkpoints, Restored
from eqvision.checkpoint.record import CheckpointError, DamagedError, Record, named_leaves
from eqvision.checkpoint.retention import steps_to_keep

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DamagedError",
    "Record",
    "Restored",
    "describe_checkpoint",
    "digests",
    "named_leaves",
    "steps_to_keep",
]
