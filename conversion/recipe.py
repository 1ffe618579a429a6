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
from pathlib import Path
from typing import Any, Literal

from ..common.settings import MAX_SHARD_SIZE, SettingsError, check_keys, parse_size


# What the settings have to know of a router. Logits of those that start from text are of any size.
TEXT_ROUTERS = ("mixture", "domain")
ROUTERS_WITHOUT_PARAMETERS = ("grouped_average",)

# In the place of values that give another setting a meaning: any but the default.
GIVEN = "given"
# By setting, those that make it out of date: a later layer that changes one of them puts the setting aside.
REPLACED_BY = {
    "revision": ("model",),
    "decoder_sparse_step": ("moe_layers",),
    "mlp_only_layers": ("moe_layers",),
}


def _setting(default: Any, help_text: str, **only_with: tuple[Any, ...] | str) -> Any:
    """Return a field; `only_with` names, by setting, the values of another one that give this one a meaning."""
    metadata = {"help": help_text, "only_with": only_with}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ConversionRecipe:
    """Settings of one conversion. The help text of each field is what the command line prints.

    Settings named like a field of `UpcycledQwenMoeConfig` go into the model's configuration as they are.
    """

    model: str | None = _setting(None, "dense checkpoint, folder or Hub id, if the command line names none")
    revision: str | None = _setting(None, "branch, tag or commit of a Hub model")
    num_experts: int = _setting(8, "routed experts in each MoE layer, 2 to 256")
    num_experts_per_tok: int = _setting(2, "experts that each token is sent to")
    decoder_sparse_step: int = _setting(1, "every n-th layer becomes a MoE layer")
    mlp_only_layers: list[int] = _setting([], "layers that stay dense")
    moe_layers: list[int] | None = _setting(
        None, "the layers that become MoE layers, counted from 0; others stay dense"
    )
    experts: Literal["copy", "noise", "drop", "split", "random"] = _setting(
        "copy",
        "how experts start: `copy` of the dense FFN; copy with `noise`; copy with a share of its neurons redrawn "
        "(`drop`); `split` into slices of it (fine-grained); `random`",
    )
    expert_noise: float = _setting(
        0.01, "noise of `noise`, in standard deviations of the matrix that it is added to", experts=("noise",)
    )
    drop_ratio: float = _setting(0.5, "share of neurons that `drop` redraws", experts=("drop",))
    expert_granularity: int = _setting(
        2, "slices that `split` cuts the FFN into; num_experts is a multiple of it", experts=("split",)
    )
    expert_sources: list[str] = _setting(
        [],
        "further dense checkpoints whose FFNs become experts beside those of the first (Branch-Train-MiX), in equal "
        "shares: folders, or Hub ids, with a revision as ID@REVISION",
    )
    backbone: Literal["auto", "copy", "average", "random"] = _setting(
        "auto",
        "all that is not an expert or a router: `copy` of the model, `average` over it and expert_sources, or "
        "`random`; `auto`: average if there are expert_sources, else copy",
    )
    shared_expert: Literal["none", "sigmoid", "plain", "complement"] = _setting(
        "none",
        "a copy of the dense FFN that sees every token, weighted by a `sigmoid` gate, by one (`plain`), or by what "
        "the highest routing probability leaves of one (`complement`)",
    )
    num_zero_experts: int = _setting(0, "further routed experts that return zero")
    num_copy_experts: int = _setting(0, "further routed experts that return their input")
    num_constant_experts: int = _setting(
        0, "further routed experts that return a learned vector mixed with their input"
    )
    router: Literal["linear", "mixture", "mlp", "grouped_average", "domain"] = _setting(
        "mixture",
        "`mixture` from the attention heads; `linear` drawn at random (vanilla upcycling); `mlp` of two layers, drawn "
        "at random; `grouped_average` of the token, without parameters; `domain`: linear, from what is special in the "
        "calibration text of each expert's domain",
    )
    num_routers: int | None = _setting(
        None, "routers of a mixture (default: as many as experts, at most as many as heads)", router=("mixture",)
    )
    heads_per_router: int | None = _setting(
        None, "attention heads joined into a router (default: as many as there are)", router=("mixture",)
    )
    head_grouping: Literal["greedy", "random"] = _setting(
        "greedy", "which heads are joined: `greedy`, the most alike, or `random` ones", router=("mixture",)
    )
    router_pooling: Literal["sum", "max"] = _setting(
        "sum", "how the routers of a mixture are pooled", router=("mixture",)
    )
    key_statistic: Literal["auto", "mean", "attended"] = _setting(
        "auto",
        "what an expert's key is made of: `mean` keys (the paper), `attended` keys, which differ between heads that "
        "share a key-value head, or `auto`: mean for multi-head, attended for grouped-query attention",
        router=("mixture",),
    )
    router_logit_std: float | Literal["auto", "none"] = _setting(
        "auto",
        "scale the logits to this standard deviation over a token's experts; `auto`: 1.0 for routers that start from "
        "text (`mixture`, `domain`), whose raw logits are of any size, and none for others; `none`: leave them (the "
        "paper)",
    )
    norm_topk_prob: bool = _setting(True, "scale the weights of a token's experts to sum to one")
    router_score_function: Literal["softmax", "sigmoid"] = _setting("softmax", "from router logits to scores")
    router_selection: Literal["top_k", "grouped_top_k", "prototype_top_k", "top_p", "expert_choice"] = _setting(
        "top_k",
        "how the experts of a token are selected: the `top_k` best; as many from each group (`grouped_top_k`), or "
        "with each group a router of its own (`prototype_top_k`); the best until their probabilities sum to "
        "router_top_p (`top_p`); `expert_choice`, in training only",
    )
    num_expert_groups: int | None = _setting(
        None, "groups of experts", router_selection=("grouped_top_k", "prototype_top_k")
    )
    router_top_p: float | None = _setting(
        None, "sum of probabilities at which top_p stops", router_selection=("top_p",)
    )
    use_router_bias: bool = _setting(False, "balance by a bias on the selection, without a loss")
    router_bias_update_rate: float = _setting(
        0.001, "how far a training step moves that bias", use_router_bias=(True,)
    )
    router_jitter_noise: float = _setting(0.0, "in training, multiply a router's input by 1 ± this")
    router_aux_loss_coef: float = _setting(0.001, "weight of the load-balancing loss in training")
    router_z_loss_coef: float = _setting(0.0, "weight of the router z-loss in training")
    router_entropy_loss_coef: float = _setting(0.0, "weight of the routing entropy in training")
    router_locality_loss_coef: float = _setting(0.0, "weight of the locality loss in training")
    expert_nodes: list[int] | None = _setting(None, "node of each expert, for the locality loss")
    calibration_data: list[str] = _setting(
        [],
        "text to calibrate on: parquet, jsonl or txt files, folders, or a Hub dataset id; for `domain`, one for each "
        "domain",
        # The model that the text would run through is not kept under `random`.
        backbone=("auto", "copy", "average"),
    )
    calibration_split: str = _setting("train", "split of a Hub dataset", calibration_data=GIVEN)
    calibration_text_column: str = _setting("text", "column that holds the text", calibration_data=GIVEN)
    calibration_tokens: int = _setting(32768, "tokens to calibrate on", calibration_data=GIVEN)
    calibration_block_size: int = _setting(1024, "tokens of one calibration sequence", calibration_data=GIVEN)
    calibration_batch_size: int = _setting(4, "calibration sequences at a time", calibration_data=GIVEN)
    max_shard_size: str = _setting(MAX_SHARD_SIZE, "largest file to write, e.g. 500MB or 5GB")
    seed: int = _setting(0, "seed of everything drawn at random")

    def __post_init__(self):
        settings = dataclasses.fields(self)
        for setting in settings:
            _check_type(setting.name, getattr(self, setting.name), setting.type)
        for setting in settings:
            other = _without_meaning(setting, vars(self))
            if other is None or getattr(self, setting.name) == _default(setting):
                continue
            values = setting.metadata["only_with"][other]
            if values is GIVEN:
                raise SettingsError(f"{setting.name} has no meaning without {other}; give both or none.")
            allowed = " or ".join(f"{other}={value!r}" for value in values)
            raise SettingsError(
                f"{setting.name} has no meaning with {other}={getattr(self, other)!r}, only with {allowed}; "
                "leave it out."
            )
        self._check_experts()
        self._check_routers()
        self._check_calibration()
        self.max_shard_bytes  # noqa: B018 - refuses a size that cannot be read

    def _check_experts(self) -> None:
        if not 2 <= self.num_experts <= 256:
            raise SettingsError(f"num_experts={self.num_experts} is outside 2 to 256.")
        for name in ("num_zero_experts", "num_copy_experts", "num_constant_experts"):
            if not 0 <= getattr(self, name) <= 256:
                raise SettingsError(f"{name}={getattr(self, name)} is outside 0 to 256.")
        if self.moe_layers is not None and (self.mlp_only_layers or self.decoder_sparse_step != 1):
            raise SettingsError("moe_layers says it all; leave mlp_only_layers and decoder_sparse_step out.")
        if not 0 < self.expert_noise < math.inf:
            raise SettingsError(f"expert_noise={self.expert_noise} must be above zero and finite.")
        if not 0 < self.drop_ratio <= 1:
            raise SettingsError(f"drop_ratio={self.drop_ratio} is outside (0, 1].")
        if self.expert_granularity < 2:
            raise SettingsError(f"expert_granularity={self.expert_granularity} must be at least 2.")
        if self.experts == "split" and self.num_experts % self.expert_granularity:
            raise SettingsError(
                f"num_experts={self.num_experts} is not a multiple of expert_granularity={self.expert_granularity}: "
                "experts come in sets of slices that make up a whole FFN."
            )
        if self.num_experts % self.num_sources:
            raise SettingsError(
                f"num_experts={self.num_experts} is not a multiple of the {self.num_sources} dense checkpoints, the "
                "model and its expert_sources."
            )
        if twice := [name for name in self.expert_sources if [self.model, *self.expert_sources].count(name) > 1]:
            raise SettingsError(
                f"expert_sources: {twice[0]} is named twice, or is the model itself, whose FFNs are experts already; "
                "name each dense checkpoint once."
            )
        if self.expert_sources and self.experts in ("split", "random"):
            raise SettingsError(f"expert_sources have no meaning with experts={self.experts!r}; leave them out.")
        if self.backbone == "average" and not self.expert_sources:
            raise SettingsError("backbone='average' has no meaning without expert_sources; give both or none.")

    def _check_routers(self) -> None:
        for name in ("num_routers", "heads_per_router"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)} must be at least 1.")
        target = self.target_logit_std
        if target is not None and not 0 < target < math.inf:
            raise SettingsError(f"router_logit_std={self.router_logit_std} must be above zero and finite.")
        if isinstance(self.router_logit_std, int | float) and not self.calibration_data:
            raise SettingsError("router_logit_std is measured on text; give calibration_data.")
        if self.router in ROUTERS_WITHOUT_PARAMETERS:
            self._check_no_parameters_are_needed()
        if self.router == "domain":
            self._check_domains()

    def _check_no_parameters_are_needed(self) -> None:
        if isinstance(self.router_logit_std, int | float):
            raise SettingsError(
                f"router_logit_std has no meaning with router={self.router!r}, which has no parameters."
            )
        if self.experts == "split":
            raise SettingsError(
                f"router={self.router!r} cannot score all slices of a copy alike, as experts='split' needs; use "
                "another router."
            )

    def _check_domains(self) -> None:
        domains = len(self.calibration_data)
        if domains < 2:
            raise SettingsError(
                f"router='domain' needs at least two domains, each an entry of calibration_data; it has {domains}."
            )
        if twice := [name for name in self.calibration_data if self.calibration_data.count(name) > 1]:
            raise SettingsError(f"calibration_data names {twice[0]!r} twice; with router='domain' each is a domain.")
        if self.expert_sources and domains != self.num_sources:
            raise SettingsError(
                f"calibration_data has {domains} domains for {self.num_sources} dense checkpoints, the model and its "
                "expert_sources; give one for each, in their order."
            )
        if self.num_ffn_copies % domains:
            of_slices = f" / expert_granularity={self.expert_granularity}" if self.experts == "split" else ""
            raise SettingsError(
                f"num_experts={self.num_experts}{of_slices} is not a multiple of the {domains} domains in "
                "calibration_data: every domain has the same number of experts."
            )

    def _check_calibration(self) -> None:
        for name in ("calibration_tokens", "calibration_block_size", "calibration_batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.calibration_tokens < self.calibration_block_size:
            raise SettingsError(
                f"calibration_tokens={self.calibration_tokens} is less than one sequence of "
                f"calibration_block_size={self.calibration_block_size}; raise the one or lower the other."
            )
        if self.num_calibration_blocks == 0:
            raise SettingsError(
                f"calibration_tokens={self.calibration_tokens} is less than one sequence of "
                f"calibration_block_size={self.calibration_block_size} for each of {self.num_domains} domains; raise "
                "the one or lower the other."
            )

    @property
    def num_sources(self) -> int:
        """Dense checkpoints whose FFNs become experts."""
        return 1 + len(self.expert_sources)

    @property
    def is_from_scratch(self) -> bool:
        """Whether nothing that a dense model has learned goes into the result."""
        return self.experts == "random" and self.backbone == "random"

    @property
    def target_logit_std(self) -> float | None:
        """Standard deviation that a token's logits are scaled to; None leaves them as they are."""
        if self.router_logit_std == "auto":
            return 1.0 if self.router in TEXT_ROUTERS else None
        return None if self.router_logit_std == "none" else float(self.router_logit_std)

    @property
    def num_ffn_copies(self) -> int:
        """FFNs that the experts make up: one each, but with `split` all slices of a copy together one."""
        return self.num_experts // (self.expert_granularity if self.experts == "split" else 1)

    @property
    def num_free_experts(self) -> int:
        """Routed experts without computation."""
        return self.num_zero_experts + self.num_copy_experts + self.num_constant_experts

    @property
    def num_distinct_experts(self) -> int:
        """Routed experts that a router tells apart: all slices of a copy have the same scores."""
        return self.num_ffn_copies + self.num_free_experts

    @property
    def num_domains(self) -> int:
        """Domains that calibration tells apart; one where it takes all text together."""
        return len(self.calibration_data) if self.router == "domain" else 1

    @property
    def num_calibration_blocks(self) -> int:
        """Whole sequences in `calibration_tokens`, equally many of each domain."""
        num_blocks = self.calibration_tokens // self.calibration_block_size
        return num_blocks - num_blocks % self.num_domains

    @property
    def num_calibrated_tokens(self) -> int:
        """Tokens that calibration really sees: those of whole sequences."""
        return self.num_calibration_blocks * self.calibration_block_size

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes (kB, MB, GB and TB are powers of 1000, KiB to TiB of 1024)."""
        return parse_size("max_shard_size", self.max_shard_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they would stand in a recipe file."""
        return dataclasses.asdict(self)


def build_recipe(*layers: tuple[str, Mapping[str, Any]]) -> ConversionRecipe:
    """Return the recipe of several layers of settings, later ones winning; each is (where it came from, settings).

    A setting that a later layer takes the meaning from, as `router: linear` does from `num_routers`, goes with it.

    Raises:
        SettingsError: for an unknown key, a wrong type or an impossible combination.
    """
    names = [setting.name for setting in dataclasses.fields(ConversionRecipe)]
    merged: dict[str, Any] = {}
    for where, settings in layers:
        check_keys(settings, names, where)
        merged = _layered(merged, settings)
    return ConversionRecipe(**merged)


def packaged_recipes() -> dict[str, Path]:
    """Return the recipe files that come with the package by name, in alphabetical order."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def _layered(before: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return `before` with `later` on top, without what it replaces or takes the meaning from."""
    merged = {**before, **later}
    # In the order of the fields: what gives others a meaning comes before them.
    for setting in dataclasses.fields(ConversionRecipe):
        if setting.name not in before or setting.name in later:
            continue
        is_replaced = any(
            name in later and later[name] != before.get(name) for name in REPLACED_BY.get(setting.name, ())
        )
        had_meaning = _without_meaning(setting, before) is None
        if is_replaced or (had_meaning and _without_meaning(setting, merged) is not None):
            del merged[setting.name]
    return merged


def _without_meaning(setting: dataclasses.Field, settings: Mapping[str, Any]) -> str | None:
    """Return the name of what takes the meaning from `setting` among `settings`; None if it has one."""
    for other in dataclasses.fields(ConversionRecipe):
        values = setting.metadata["only_with"].get(other.name)
        value = settings.get(other.name, _default(other))
        if values is not None and (value == _default(other) if values is GIVEN else value not in values):
            return other.name
    return None


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
