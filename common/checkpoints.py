"""Loading finished checkpoints to look at them: a folder or a Hub id, with the code that it brings, if any."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .devices import is_out_of_memory
from .settings import SettingsError
from .tokenizers import has_vocabulary


def check_code(model: str, *, trust_remote_code: bool, revision: str | None = None) -> None:
    """Check that loading `model` runs no code that is downloaded, or that this is trusted.

    The code in a local folder runs without leave: whoever gave the folder can read it.

    Raises:
        SettingsError: if it would, or the configuration cannot be read.
    """
    check_exists(model)
    if trust_remote_code:
        return
    way_out = "give trust_remote_code (--trust-remote-code) if you trust it"
    names = [str(name) for name in _auto_map(model, revision).values()]
    if names and not Path(model).is_dir():
        raise SettingsError(f"{model}: this Hub checkpoint runs code that it brings; {way_out}.")
    if foreign := [name for name in names if "--" in name]:
        raise SettingsError(
            f"{Path(model) / 'config.json'}: names code of another repository ({foreign[0]}); {way_out}."
        )


def load_config(model: str, *, own_code: bool = True, revision: str | None = None) -> PreTrainedConfig:
    """Return the configuration of `model`, by the code beside its weights if it brings some and `own_code`.

    Raises:
        SettingsError: if it cannot be loaded.
    """
    if Path(model).is_dir() and not (Path(model) / "config.json").exists():
        raise SettingsError(f"{model}: there is no config.json; give the folder of a finished checkpoint.")
    _auto_map(model, revision)  # what is wrong with it has no clear message below
    with _loading(model):
        auto_class = _auto_class("AutoConfig", model, own_code, revision)
        return auto_class.from_pretrained(model, revision=revision or "main")


def load_model(
    model: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str,
    own_code: bool = True,
    revision: str | None = None,
) -> PreTrainedModel:
    """Return `model`, a language model or a sequence classifier, in evaluation mode on `device`.

    Raises:
        SettingsError: if it cannot be loaded, or its tensors are not the ones that the configuration asks for.
    """
    with _loading(model):
        auto_class = _auto_class(_auto_name(config), model, own_code, revision)
        loaded, info = auto_class.from_pretrained(
            model,
            config=config,
            dtype=dtype,
            revision=revision or "main",
            ignore_mismatched_sizes=True,  # the check below names them
            output_loading_info=True,
        )
    _check_tensors(model, loaded, info)
    with _loading(model):
        return loaded.eval().to(device)


def model_without_weights(
    model: str, config: PreTrainedConfig, *, own_code: bool = True, revision: str | None = None
) -> PreTrainedModel:
    """Return what [`load_model`] would, on the meta device: what the model is made of, in a moment and for no memory.

    Raises:
        SettingsError: if it cannot be made.
    """
    with _loading(model), torch.device("meta"):
        auto_class = _auto_class(_auto_name(config), model, own_code, revision)
        is_model = issubclass(auto_class, PreTrainedModel)
        return auto_class._from_config(config) if is_model else auto_class.from_config(config)


def load_tokenizer(
    model: str, *, config: PreTrainedConfig | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `model`; it runs no code that the checkpoint brings.

    Args:
        config: load it as that of a model with this configuration; by default with the one beside it.

    Raises:
        SettingsError: if there is none.
    """
    with _loading(model):
        # Unless told, it asks at the terminal whether to run the code of the model, which it needs for nothing.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model, config=config, revision=revision or "main", trust_remote_code=False
        )
    # For some model types, Transformers makes up an empty one where there are no files.
    if not has_vocabulary(tokenizer):
        raise SettingsError(f"{model}: there is no tokenizer; put its files beside the weights.")
    return tokenizer


def check_exists(model: str) -> None:
    """Check that `model` is a folder, unless it looks like a Hub id.

    Raises:
        SettingsError: if it is neither.
    """
    if not Path(model).is_dir() and not re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]+)?", model):
        raise SettingsError(f"{model}: no such folder, and not a Hub id like org/name.")


def _auto_name(config: PreTrainedConfig) -> str:
    is_classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    return "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"


def _check_tensors(model: str, loaded: PreTrainedModel, info: dict[str, Any]) -> None:
    """Check what loading tells of the tensors in the files: Transformers draws those that are missing at random."""
    # Nothing is missing of what has no elements, such as a shared expert of width zero.
    empty = {name for name, tensor in loaded.state_dict().items() if tensor.numel() == 0}
    problems = (
        ("has another shape in the files than the configuration says", [name for name, *_ in info["mismatched_keys"]]),
        ("is missing from the files", set(info["missing_keys"]) - empty),
        ("has no place in the model", info["unexpected_keys"]),
    )
    for problem, names in problems:
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise SettingsError(
                f"{model}: tensor {min(names)!r} {problem}{more}; give a checkpoint whose config.json and weights "
                "belong together."
            )


def _auto_map(model: str, revision: str | None) -> dict[str, str]:
    with _loading(model):
        auto_map = _config_dict(model, revision).get("auto_map", {})
    if not isinstance(auto_map, dict):
        raise SettingsError(
            f"{model}: auto_map in config.json is {auto_map!r} instead of names of classes; remove it there, or name "
            "the code that the model needs."
        )
    return auto_map


def _config_dict(model: str, revision: str | None) -> dict[str, Any]:
    return PreTrainedConfig.get_config_dict(model, revision=revision or "main")[0]


def _auto_class(name: str, model: str, own_code: bool, revision: str | None) -> type:
    """Return the class that loads `model`: from the code beside its weights, or the Auto class `name`.

    The Auto classes themselves prefer a class that this process has registered over that code.
    """
    auto_map = _auto_map(model, revision) if own_code else {}
    if name not in auto_map:
        return getattr(transformers, name)
    return get_class_from_dynamic_module(auto_map[name], model, revision=revision or "main")


@contextmanager
def _loading(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        if is_out_of_memory(error):
            raise
        raise SettingsError(f"{model}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error
