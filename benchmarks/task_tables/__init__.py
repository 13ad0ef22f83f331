"""The tables of `tasks.py`, a module each. `tasks.py` says what a module holds."""
