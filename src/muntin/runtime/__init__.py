"""Artefacts that compute: sessions and their engines, tiles, verification, hardware. Runs without torch."""

from __future__ import annotations

from muntin.runtime.engines.registry import ENGINES, load
from muntin.runtime.host.hardware import describe_hardware
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import ExecutedLayer, Session
from muntin.runtime.tiles import predict
from muntin.runtime.verification.artifact import VerifyResult, verify
from muntin.runtime.verification.golden import GoldenResult

__all__ = [
    "ENGINES",
    "ExecutedLayer",
    "GoldenResult",
    "Session",
    "SessionOptions",
    "VerifyResult",
    "describe_hardware",
    "load",
    "predict",
    "verify",
]
