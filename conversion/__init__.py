"""From a dense Qwen checkpoint to a Mixture-of-Experts one."""
