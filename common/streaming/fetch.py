"""Where a checkpoint lies: in a folder, or on the Hub, from which it is fetched."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..companions import COMPANION_FILES, COMPANION_FOLDERS
from .stored import SourceError, StoredTensor


def locate(model: str, revision: str | None, *, weights: bool = True) -> tuple[Path, str | None]:
    """Return the folder of `model`, and its commit if it is a Hub id, which is downloaded first.

    Args:
        revision: branch, tag or commit of the Hub repository.
        weights: whether the weights of a Hub model are downloaded.

    Raises:
        SourceError: if there is no such folder or Hub model.
    """
    if not model:
        raise SourceError("'' is no checkpoint; give a folder (. for the current one) or a Hub id.")
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise SourceError(f"revision={revision!r} has no meaning for the local folder {model}; leave it out.")
        return folder, None
    if folder.is_file():
        raise SourceError(f"{model}: is a file; give the folder of the checkpoint.")
    folder = _download(model, revision, weights)
    return folder, folder.name  # a snapshot's folder is named after its commit


@dataclass(frozen=True)
class Repository:
    """A Hub repository at a commit, of which no weights are downloaded."""

    model: str
    commit: str

    def has(self, file_name: str) -> bool:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            return self._asking(HfApi().file_exists, file_name)
        except SourceError as error:
            if isinstance(error.__cause__, OfflineModeIsEnabled):
                return False  # then what is in the cache is all there is
            raise

    def read_header(self, path: Path) -> dict[str, StoredTensor]:
        from huggingface_hub import HfApi

        header = self._asking(HfApi().parse_safetensors_file_metadata, path.name).tensors
        return {
            name: StoredTensor(name, entry.dtype, tuple(entry.shape), path, begin, end - begin)
            for name, entry in header.items()
            for begin, end in [entry.data_offsets]
        }

    def _asking(self, function: Callable, file_name: str) -> Any:
        try:
            return function(self.model, file_name, revision=self.commit)
        # Beside the Hub's errors the HTTP client's, which is not the same in all versions of the Hub's library.
        except Exception as error:
            raise SourceError(f"{self.model}: {file_name} cannot be read from the Hub ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _download(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors.index.json", "config.json", "README.md", *COMPANION_FILES]
    patterns += ["*.safetensors"] * weights
    patterns += [f"{name}/*" for name in COMPANION_FOLDERS]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"{model}: neither a local folder nor a Hub model that can be fetched ({_reason(error)})"
        ) from error
