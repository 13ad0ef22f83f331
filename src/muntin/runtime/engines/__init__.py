"""The engines: OpenVINO and ONNX Runtime behind one kind of session, and the cache of their compiled models."""
