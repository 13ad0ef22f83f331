"""The tables of `tasks.py`: functions of a seed, minutes and a folder, which train each model, deploy it and return a row a model."""
