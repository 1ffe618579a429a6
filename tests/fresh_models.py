"""Converting and loading, as several tests do."""

from transformers import AutoModelForCausalLM

from upcycled_moe.common.progress import Progress


# Largest |Δlogit| in float32 for logits of order one.
TOLERANCE = 5e-6


class Warnings(Progress):
    """Collects the warnings of a conversion."""

    def __init__(self):
        self.messages = []

    def warn(self, message):
        self.messages.append(message)


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments).eval()
