"""From a Mixture-of-Experts checkpoint back to a dense one."""
