"""The training text, from files and Hub datasets to batches."""
