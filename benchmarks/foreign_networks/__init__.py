"""Parts of foreign.py: networks of other packages, their data, and how other tools make them smaller."""
