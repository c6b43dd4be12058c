"""From a file to a batch: sources, text, corpus, encoding, vectors, batches."""
