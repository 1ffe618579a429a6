"""Preference pairs: reading them, and models that score conversations or prefer one of two."""
