"""Names on the Hub: of models and datasets."""

from glob import has_magic
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def is_hub_id(name: str) -> bool:
    """Return whether `name` is of the form `org/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def is_hub_dataset(name: str) -> bool:
    """Return whether a source of text is a dataset on the Hub, with or without its configuration (`org/name:config`).

    What is here as a file or folder is not.
    """
    return is_hub_id(name.partition(":")[0]) and not Path(name).exists() and not has_magic(name)
