"""Checkpoints, and how a run ends and goes on."""
