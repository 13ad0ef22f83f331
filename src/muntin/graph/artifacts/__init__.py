"""From an ONNX model to an artefact with named inputs and outputs: its signature, golden pairs, and the engines' answers."""
