"""Learning from new data without forgetting, and the gate that a deployed artefact passes before it serves."""
