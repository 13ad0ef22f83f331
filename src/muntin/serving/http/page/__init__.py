"""The page at `/`: pictures and their answers, versions, load."""
