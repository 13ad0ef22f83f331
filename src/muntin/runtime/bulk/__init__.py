"""Many pictures and videos: what is done with one, the results that are there already, and other machines."""
