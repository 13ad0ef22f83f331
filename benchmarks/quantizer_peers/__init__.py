"""Parts of quantizers.py: networks and their data, the work of child processes, and what is measured of the results."""
