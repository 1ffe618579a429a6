"""The configuration of the dense model."""

from dataclasses import fields

from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

from modeling_upcycled_moe import UpcycledQwenMoeConfig


CONFIG_CLASSES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}
# These say what the model is and by what it was written.
NOT_CARRIED = {"model_type", "transformers_version", "architectures"}


def dense_config(config: UpcycledQwenMoeConfig, width: int) -> PreTrainedConfig:
    """Return the configuration of the dense model of which one with `config` was made.

    Args:
        width: of its FFNs.
    """
    config_class = CONFIG_CLASSES[config.base_model_type]
    names = {field.name for field in fields(config_class)} - NOT_CARRIED
    settings = {name: value for name, value in config.to_dict().items() if name in names}
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        settings["head_dim"] = config.head_dim  # no field of Qwen2's, but its attention reads it
    head = config.architectures[0].removeprefix("UpcycledQwenMoe")
    return config_class(
        **settings | {"architectures": [f"{config.base_model_type.capitalize()}{head}"], "intermediate_size": width}
    )
