"""Plans for exact tiles, from a graph alone: what is computed over the whole picture, where the graph is cut, how far values reach.

graph -> shapes at two sizes -> layouts -> reductions over the picture -> levels -> cuts -> passes -> halo of each pass
"""
