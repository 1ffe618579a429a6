"""A vLLM server answers completions from an upcycled checkpoint; see `vllm_environment.py`."""

import json
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from vllm_environment import NUM_TOKENS, SHAPE, greedy_tokens, vllm_python, vllm_variables

from modeling_upcycled_moe import UpcycledQwenMoeForCausalLM
from upcycled_moe.cli.main import main


PROMPT = "the of and to in is that it was for with"


@contextmanager
def _server(folder: Path, scratch: Path) -> Iterator[str]:
    """Serve `folder` until the block ends, and give the address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts; that command itself looks for a distribution `vllm`, which the CPU build is not.
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = ["--model-impl", "transformers", "--trust-remote-code", "--dtype", "float32", "--enforce-eager"]
    process = subprocess.Popen(
        [*command, *options, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "moe"],
        env=vllm_variables(scratch / "cache"),
        cwd=scratch,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("the server did not start:\n" + "".join(lines[-60:]))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _post(address: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


@pytest.mark.slow
def test_a_server_completes_text_as_transformers_does(dense, text_file, tmp_path):
    folder = tmp_path / "moe"
    arguments = ["--num-experts", "4", "--experts", "drop", "--router", "linear"]
    assert main(["convert", str(dense("qwen2", **SHAPE)), str(folder), *arguments]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = UpcycledQwenMoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = greedy_tokens(model, [tokenizer(PROMPT)["input_ids"]])[0]

    request = {"model": "moe", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    request |= {"return_token_ids": True, "ignore_eos": True}
    with _server(folder, tmp_path) as address:
        answer = _post(f"{address}/v1/completions", request)["choices"][0]

    assert answer["token_ids"] == expected
    assert answer["text"] == tokenizer.decode(expected, skip_special_tokens=True)
