"""Parts of architectures.py: the list of models, real pictures, configurations of transformers, and the measurement of one model."""
