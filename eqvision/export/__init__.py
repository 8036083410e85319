"""Models as files for elsewhere: a StableHLO program, or parameters and statistics as safetensors.

Both carry a ``Card``: what has to be known to use the model, preprocessing included. Neither format has a checksum of
its own, so both get a SHA-256 that is verified on reading. Nothing is written in place: a file is whole or not there.
"""

from eqvision.export.card import Card, ModelFile, model_of_run, model_of_zoo
from eqvision.export.stablehlo import ExportedDetector, ExportedModel, Program, export_stablehlo, load_exported, sidecar
from eqvision.export.tensors import export_safetensors, has_card, load_safetensors, read_card

__all__ = [
    "Card",
    "ExportedDetector",
    "ExportedModel",
    "ModelFile",
    "Program",
    "export_safetensors",
    "export_stablehlo",
    "has_card",
    "load_exported",
    "load_safetensors",
    "model_of_run",
    "model_of_zoo",
    "read_card",
    "sidecar",
]
