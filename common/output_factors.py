"""What conversion multiplies the outputs of experts with, and merging divides them by."""


def output_factors(experts: str, backbone: str, shared_expert: str) -> tuple[float, float]:
    """Return what the down projections of the routed and of the shared expert are multiplied with.

    So that both together are one dense FFN if each is a copy of it: under a sigmoid gate of zeros the shared expert
    weighs one half by itself, and with `complement` all weights sum to one. Halving is exact as long as the half is a
    normal number: in float16 weights below 2^-13 may lose their last bit.

    Args:
        experts, backbone, shared_expert: settings of the conversion.
    """
    if "random" in (experts, backbone):
        return 1.0, 1.0
    return {"none": (1.0, 1.0), "sigmoid": (0.5, 1.0), "plain": (0.5, 0.5), "complement": (1.0, 1.0)}[shared_expert]
