"""The data pipeline from a file to a batch: sources, text, corpus, encoding, vectors, batches."""
