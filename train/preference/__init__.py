"""Training on preference pairs: reward models, and iterative DPO."""
