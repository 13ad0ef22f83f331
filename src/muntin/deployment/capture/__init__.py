"""Capture of a PyTorch model as a float ONNX graph, and the checks that the graph computes what the model does."""
