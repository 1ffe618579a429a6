"""What the routers and experts of Mixture-of-Experts checkpoints do, in figures."""
