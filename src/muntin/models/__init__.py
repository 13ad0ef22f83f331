"""Models: the HybridNet family, and wrappers for models of other packages."""

from muntin.models.compression_record import Change, CompressionRecord
from muntin.models.config import PRESETS, ModelConfig
from muntin.models.create import create_model
from muntin.models.foreign import DividedSides, ForeignModel
from muntin.models.hybridnet import HybridNet
from muntin.models.session import TorchSession

__all__ = [
    "PRESETS", "Change", "CompressionRecord", "DividedSides", "ForeignModel", "HybridNet", "ModelConfig", "TorchSession", "create_model",
]  # fmt: skip
