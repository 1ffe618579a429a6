"""Checkpoints that are read and written without ever being in memory: one part of one tensor at a time."""
