"""A small, complete run on packaged text: `python -m upcycled_moe.demo`."""
