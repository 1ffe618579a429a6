"""A checkpoint that is made of another one: streamed, and all or nothing."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from .checkpoint_source import CheckpointSource
from .companions import copy_companions, declare_tokenizer_class, tokenizer_class_to_declare
from .output_folder import OutputError, check_output_folder, staged
from .progress import Progress
from .streaming.planned import Shard, num_parameters
from .streaming.writer import write_weights


# What the files beside the weights may need: configuration, code, tokenizer, card.
COMPANION_BYTES = 64 * 1000**2


@dataclass(frozen=True)
class DerivedCheckpoint:
    """What will be written.

    Args:
        source: what it is made of.
        config: of the new model; its architecture says which class loads it.
        shards: the weight files, with the content of every tensor.
    """

    source: CheckpointSource
    config: PreTrainedConfig
    shards: tuple[Shard, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def total_parameters(self) -> int:
        """Parameters of the new model; tied embeddings count once."""
        return num_parameters(self.shards, self.config.tie_word_embeddings)


def check_checkpoint_folder(
    out: Path, num_bytes: int, sources: Mapping[str, Path], kept: Iterable[Path], overwrite: bool
) -> None:
    """Check, before anything is written, that a checkpoint with `num_bytes` of weights can be written to `out`.

    Args:
        sources: folders that it is made of, by what errors call them; it may lie in none of them.
        kept: further files and folders that are read.
        overwrite: whether a checkpoint may be replaced.

    Raises:
        OutputError: if not.
    """
    target = out.resolve()
    for name, source in sources.items():
        if target == source.resolve():
            raise OutputError(f"{out}: is {name} itself; give another folder.")
        if target.is_relative_to(source.resolve()):
            raise OutputError(f"{out}: lies in the folder of {name}; give a folder outside.")
    check_output_folder(out, num_bytes + COMPANION_BYTES, (*sources.values(), *kept, Path.cwd()), overwrite)


def check_derived(derived: DerivedCheckpoint, out: Path, kept: Iterable[Path], overwrite: bool) -> None:
    """Check that `derived` can be written to `out`; see [`check_checkpoint_folder`]."""
    source = derived.source
    check_checkpoint_folder(out, derived.num_bytes, {source.name: source.folder}, kept, overwrite)


@contextmanager
def written(derived: DerivedCheckpoint, out: Path, overwrite: bool, progress: Progress) -> Iterator[Path]:
    """Write `derived` and give the folder, which loads as it is; at the end it takes the place of `out`.

    In the meantime the caller can measure the new model, and adds what it has to say: provenance and card. An error
    leaves nothing of it.

    Raises:
        OSError: if writing fails.
    """
    source = derived.source
    tokenizer_class = tokenizer_class_to_declare(source.name, source.folder, derived.config, progress)
    with staged(out, overwrite) as folder:
        with progress.task("Writing", derived.num_bytes, "bytes") as advance:
            write_weights(derived.shards, {}, folder, advance, num_parameters=derived.total_parameters)
        copy_companions(source.folder, folder)
        if tokenizer_class is not None:
            declare_tokenizer_class(folder, tokenizer_class)
        derived.config.save_pretrained(folder)
        yield folder
