"""The yardstick: a linear classifier of word n-grams, which a GRU should beat to be worth it."""
