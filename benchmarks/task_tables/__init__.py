"""The tables of `tasks.py`, a module each: `REQUIRES` (packages, by pip's names) and `measure(seed, minutes, folder)`, which trains each
model for so many minutes in the folder, deploys it, and returns a row a model."""
