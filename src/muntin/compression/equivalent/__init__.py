"""Rewrites that leave the answer of a model as it is: norms and gates folded, convolutions written plainly, channels scaled."""
