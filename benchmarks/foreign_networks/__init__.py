"""The networks of `foreign.py`, and the forms in which it compares them."""
