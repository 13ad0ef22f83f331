"""The OpenVINO engine: its session, and changes of a model before it is compiled."""
