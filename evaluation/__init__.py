"""What a model is worth: benchmark tasks, and perplexity by domain."""
