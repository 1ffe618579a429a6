"""Training upcycled models with the Trainer of Transformers."""
