"""What conversion and training both need: strict settings and streamed text."""
