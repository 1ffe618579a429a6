"""The recipe: every setting of a conversion, with its default, in one place.

A recipe file (YAML) and the command line hold the same settings; the command line wins over the file, the file over
the defaults here. Nothing in this module needs torch.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..common.settings import SettingsError, check_keys


# Settings that only one router type reads.
ROUTER_SETTINGS = {"mixture": ("num_routers", "heads_per_router", "router_pooling", "key_statistic")}


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class ConversionRecipe:
    """Settings of one conversion. The help text of each field is what the command line prints."""

    num_experts: int = _setting(8, "routed experts in each MoE layer")
    num_experts_per_tok: int = _setting(2, "experts that each token is sent to")
    experts: Literal["copy"] = _setting("copy", "how experts start: `copy` of the dense FFN")
    decoder_sparse_step: int = _setting(1, "every n-th layer becomes a MoE layer")
    mlp_only_layers: list[int] = field(default_factory=list, metadata={"help": "layers that stay dense"})
    router: Literal["linear", "mixture"] = _setting(
        "mixture", "`mixture` from the attention heads, or `linear` drawn at random (vanilla upcycling)"
    )
    num_routers: int | None = _setting(None, "routers of a mixture (default: num_experts)")
    heads_per_router: int | None = _setting(
        None, "attention heads joined into a router (default: as many as there are)"
    )
    router_pooling: Literal["sum", "max"] = _setting("sum", "how the routers of a mixture are pooled")
    key_statistic: Literal["auto", "mean", "attended"] = _setting(
        "auto",
        "what an expert's key is made of: `mean` keys (the paper), `attended` keys, which differ between heads that "
        "share a key-value head, or `auto`: mean for multi-head, attended for grouped-query attention",
    )
    router_logit_std: float | Literal["auto", "none"] = _setting(
        "auto",
        "scale the logits to this standard deviation over a token's experts; `auto`: 1.0 for a mixture, whose raw "
        "logits make the softmax nearly one-hot, and none for a linear router; `none`: leave them (the paper)",
    )
    router_aux_loss_coef: float = _setting(0.001, "weight of the load-balancing loss in training")
    router_z_loss_coef: float = _setting(0.0, "weight of the router z-loss in training")
    calibration_data: list[str] = field(
        default_factory=list,
        metadata={"help": "text to calibrate on: parquet, jsonl or txt files, folders, or a Hub dataset id"},
    )
    calibration_split: str = _setting("train", "split of a Hub dataset")
    calibration_text_column: str = _setting("text", "column that holds the text")
    calibration_tokens: int = _setting(32768, "tokens to calibrate on")
    calibration_block_size: int = _setting(1024, "tokens of one calibration sequence")
    calibration_batch_size: int = _setting(4, "calibration sequences at a time")
    max_shard_size: str = _setting("5GB", "largest file to write, e.g. 500MB or 5GB")
    seed: int = _setting(0, "seed of everything drawn at random")

    def __post_init__(self):
        for recipe_field in dataclasses.fields(self):
            _check_type(recipe_field.name, getattr(self, recipe_field.name), recipe_field.type)
        for name in ("num_experts", "calibration_tokens", "calibration_block_size", "calibration_batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)} must be at least 1.")
        for router, names in ROUTER_SETTINGS.items():
            for setting in dataclasses.fields(self):
                given = setting.name in names and getattr(self, setting.name) != _default(setting)
                if given and router != self.router:
                    raise SettingsError(f"{setting.name} has no meaning with router={self.router!r}; leave it out.")
        for name in ("num_routers", "heads_per_router"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)} must be at least 1.")
        target = self.target_logit_std
        if target is not None and not 0 < target < math.inf:
            raise SettingsError(f"router_logit_std={self.router_logit_std} must be above zero and finite.")
        if isinstance(self.router_logit_std, int | float) and not self.calibration_data:
            raise SettingsError("router_logit_std is measured on text; give calibration_data.")
        if self.calibration_tokens < self.calibration_block_size:
            raise SettingsError(
                f"calibration_tokens={self.calibration_tokens} is less than one sequence of "
                f"calibration_block_size={self.calibration_block_size}; raise the one or lower the other."
            )
        if not self.calibration_data:
            for setting in dataclasses.fields(self):
                if setting.name.startswith("calibration_") and getattr(self, setting.name) != _default(setting):
                    raise SettingsError(f"{setting.name} has no meaning without calibration_data; give both or none.")
        self.max_shard_bytes  # noqa: B018 - refuses a size that cannot be read

    @property
    def target_logit_std(self) -> float | None:
        """Standard deviation that a token's logits are scaled to; None leaves them as they are."""
        if self.router_logit_std == "auto":
            return 1.0 if self.router == "mixture" else None
        return None if self.router_logit_std == "none" else float(self.router_logit_std)

    @property
    def num_calibration_blocks(self) -> int:
        """Whole sequences in `calibration_tokens`."""
        return self.calibration_tokens // self.calibration_block_size

    @property
    def num_calibrated_tokens(self) -> int:
        """Tokens that calibration really sees: those of whole sequences."""
        return self.num_calibration_blocks * self.calibration_block_size

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes (kB, MB, GB and TB are powers of 1000, KiB to TiB of 1024)."""
        text = self.max_shard_size.strip()
        number = text.rstrip("KMGTiBkmgtb")
        units = {"": 1, "B": 1}
        for power, prefix in enumerate("KMGT", start=1):
            units[f"{prefix}B"] = 1000**power
            units[f"{prefix}IB"] = 1024**power
        unit = text[len(number) :].upper()
        try:
            size = int(float(number) * units[unit])
        except (ValueError, KeyError, OverflowError):
            raise SettingsError(
                f"max_shard_size={self.max_shard_size!r} is not a size; write e.g. 500MB or 5GB."
            ) from None
        if size < 1:
            raise SettingsError(f"max_shard_size={self.max_shard_size!r} must be above zero.")
        return size

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they would stand in a recipe file."""
        return dataclasses.asdict(self)


def build_recipe(*layers: tuple[str, Mapping[str, Any]]) -> ConversionRecipe:
    """Return the recipe of several layers of settings, later ones winning; each is (where it came from, settings).

    Raises:
        SettingsError: for an unknown key, a wrong type or an impossible combination.
    """
    names = [recipe_field.name for recipe_field in dataclasses.fields(ConversionRecipe)]
    merged: dict[str, Any] = {}
    for where, settings in layers:
        check_keys(settings, names, where)
        merged |= settings
    return ConversionRecipe(**merged)


def _default(setting: dataclasses.Field) -> Any:
    return setting.default if setting.default_factory is dataclasses.MISSING else setting.default_factory()


def allowed_types(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a field's annotation: `int | None` gives (int, NoneType)."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    if not any(_matches(value, alternative) for alternative in allowed_types(annotation)):
        raise SettingsError(f"{name}={value!r}: expected {_describe(annotation)}.")


def _matches(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return value in typing.get_args(annotation)
    if origin is list:
        return isinstance(value, list) and all(_matches(item, typing.get_args(annotation)[0]) for item in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, annotation) and not (annotation is int and isinstance(value, bool))


def _describe(annotation: Any) -> str:
    def describe(alternative: Any) -> str:
        if typing.get_origin(alternative) is Literal:
            return " or ".join(repr(choice) for choice in typing.get_args(alternative))
        if typing.get_origin(alternative) is list:
            return f"a list of {typing.get_args(alternative)[0].__name__}"
        return "null" if alternative is type(None) else alternative.__name__

    return " or ".join(describe(alternative) for alternative in allowed_types(annotation))
