"""An artefact behind HTTP and gRPC: the Open Inference Protocol, a latency objective, versions that change without a break. No torch."""
