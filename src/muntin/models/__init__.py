"""Models: the HybridNet family, and a thin face for models that are not ours."""

from muntin.models.config import ModelConfig, Task
from muntin.models.create import create_model
from muntin.models.foreign import DividedSides, ForeignModel
from muntin.models.hybridnet import HybridNet
from muntin.models.presets import PRESETS
from muntin.models.session import TorchSession

__all__ = ["PRESETS", "DividedSides", "ForeignModel", "HybridNet", "ModelConfig", "Task", "TorchSession", "create_model"]
