"""Forward, backward and decode of a mixture router's model against stock Qwen3-MoE of equal shape.

    python benchmarks/routing.py [--rounds 7]

Contestants take turns; the ratio is taken round by round. The stock model returns no router logits in training
unless told so; here both add their load-balancing loss, as a training run does.
"""

import argparse
import time
from collections.abc import Callable

import torch
from measure import machine, spread
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from modeling_upcycled_moe import UpcycledQwenMoeConfig, UpcycledQwenMoeForCausalLM


SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "output_router_logits": True,
}
BATCH_SIZE, SEQUENCE_LENGTH, NEW_TOKENS = 2, 512, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    torch.manual_seed(0)
    stock = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE)).to(device, dtype)
    models = {"Qwen3-MoE (stock)": stock}
    models["mixture"] = upcycled(stock, router_type="mixture")
    models["mixture, folded"] = upcycled(stock, router_type="mixture").fold_routers()
    tokens = torch.randint(SHAPE["vocab_size"], (BATCH_SIZE, SEQUENCE_LENGTH), device=device)

    print(machine(), f"on {device}, {dtype}")
    print("\n| | stock | mixture ÷ stock | folded ÷ stock |\n|---|---:|---:|---:|")
    for name, work in {"training step": training_step, "forward": forward, "decode": decode}.items():
        compare(name, work, models, tokens, options.rounds)


def upcycled(stock: Qwen3MoeForCausalLM, **router) -> UpcycledQwenMoeForCausalLM:
    """Return our model with the stock model's weights; the router is its own."""
    model = UpcycledQwenMoeForCausalLM(UpcycledQwenMoeConfig(base_model_type="qwen3", **SHAPE, **router))
    model.load_state_dict(stock.state_dict(), strict=False)
    return model.to(stock.device, stock.dtype)


def training_step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    model(tokens, labels=tokens).loss.backward()


@torch.no_grad()
def forward(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model.eval()
    model(tokens, output_router_logits=False)


@torch.no_grad()
def decode(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model.eval()
    prompt = tokens[:, :16]
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_router_logits=False,
    )


def compare(name: str, work: Callable, models: dict[str, torch.nn.Module], tokens: torch.Tensor, rounds: int) -> None:
    """Print a row: seconds of the stock model, and the others' ratio to it."""
    seconds: dict[str, list[float]] = {model: [] for model in models}
    for counted in [False] + [True] * rounds:
        for model_name, model in models.items():
            begin = time.perf_counter()
            work(model, tokens)
            if tokens.device.type != "cpu":
                torch.accelerator.synchronize()
            if counted:
                seconds[model_name].append(time.perf_counter() - begin)
    stock, mixture, folded = seconds.values()
    ratios = [spread([own / base for own, base in zip(other, stock, strict=True)]) for other in (mixture, folded)]
    print(f"| {name}, s | {spread(stock)} | {ratios[0]} | {ratios[1]} |", flush=True)


if __name__ == "__main__":
    main()
