"""The tokenizer beside a stock model: it cuts text as it did beside the upcycled one."""

import json
from pathlib import Path

from ..common.checkpoints import load_tokenizer
from ..common.files import write_text
from ..common.moe_source import MoeSource
from ..common.progress import Progress
from ..common.settings import SettingsError


TOKENIZER_FILE = "tokenizer.json"


def write_tokenizer_pipeline(source: MoeSource, folder: Path, progress: Progress) -> None:
    """Write into `folder` the tokenizer of `source` with the steps that its class puts in, unless they are there.

    Beside a Mixtral model Transformers passes over the class that a tokenizer declares and takes the file as it is.
    Qwen2Tokenizer, which it takes beside the others, has its own steps whatever the file says.
    """
    if not source.has_tokenizer:
        return
    try:
        pipeline = load_tokenizer(str(source.folder)).backend_tokenizer.to_str(pretty=True)
    except SettingsError as error:
        progress.warn(f"{error} The tokenizer's files are carried over as they are.")
        return
    path = folder / TOKENIZER_FILE
    if not path.exists() or json.loads(path.read_text(encoding="utf-8")) != json.loads(pipeline):
        write_text(path, pipeline)
