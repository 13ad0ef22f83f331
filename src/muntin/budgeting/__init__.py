"""One accuracy budget for ranks, channels and bits together, kept by the deployed artefact."""
