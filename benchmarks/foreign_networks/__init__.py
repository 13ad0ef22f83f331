"""Networks of other packages, their data, their forms (muntin's and other tools'), and how these are judged: foreign, sparsity, budget."""
