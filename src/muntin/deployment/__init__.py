"""Deployment: a model becomes an artefact, and the artefact is checked in its real runtime."""

from muntin.deployment.counting import image_macs, parameter_count
from muntin.deployment.export import export, infer_signature
from muntin.deployment.sources.opening import OpenedModel, open_model
from muntin.deployment.torch_profile import named_ranges, profile_torch
from muntin.models import TorchSession

__all__ = [
    "OpenedModel", "TorchSession", "export", "image_macs", "infer_signature", "named_ranges", "open_model", "parameter_count",
    "profile_torch",
]  # fmt: skip
