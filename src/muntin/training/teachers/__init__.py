"""Teachers: trained models whose answers a model learns beside the labels, also on pictures without labels."""
