"""The configuration of the stock model."""

import json
from dataclasses import fields
from pathlib import Path

from transformers import PreTrainedConfig

from modeling_upcycled_moe import UpcycledQwenMoeConfig

from ..common.files import write_text
from .targets import Target


# Mixtral multiplies the input of the experts with it too, and only in training.
NOT_CARRIED = {"router_jitter_noise"}


def native_config(config: UpcycledQwenMoeConfig, target: Target) -> PreTrainedConfig:
    """Return the configuration of the model of `target` that computes what one with `config` does.

    What both know by the same name means the same, but for what is set here.
    """
    carried = {
        field.name: getattr(config, field.name)
        for field in fields(target.config_class)
        if hasattr(config, field.name) and field.name not in NOT_CARRIED
    }
    is_sliding = "sliding_attention" in config.layer_types
    settings = {
        "architectures": [target.architecture(config)],
        "head_dim": config.head_dim,
        "router_aux_loss_coef": float(config.router_aux_loss_coef),
        "sliding_window": config.sliding_window if is_sliding else None,
    }
    if target.has_dense_layers:
        settings |= {"use_sliding_window": is_sliding}
    else:
        # Without dense layers there is one width, of which this is the name.
        settings |= {"intermediate_size": config.moe_intermediate_size}
    return target.config_class(**carried | settings)


def declare_num_experts(folder: Path, config: UpcycledQwenMoeConfig, target: Target) -> None:
    """Say in the config.json in `folder` how many experts there are, by every name that it is looked up by."""
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= dict.fromkeys(target.num_experts_names, config.num_experts)
    write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
