"""Parts of architectures.py: real images, configurations of transformers, and the measurement of one model."""
