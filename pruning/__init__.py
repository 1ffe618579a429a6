"""Fewer experts: some are dropped, or groups of them merged into one."""
