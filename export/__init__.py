"""From an upcycled checkpoint to one of a stock architecture, which needs no code of ours."""
