"""The baseline: a linear classifier of word n-grams, which a GRU should surpass."""
