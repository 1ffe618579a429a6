"""The command line: `upcycled-moe`."""
