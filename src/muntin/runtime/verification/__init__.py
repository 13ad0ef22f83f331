"""Verification of an artefact on this machine: golden pairs, single layers, and integer arithmetic."""
