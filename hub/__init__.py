"""The Hugging Face Hub: what of a checkpoint goes there, and how."""
