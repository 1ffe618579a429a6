"""A checkpoint as a training leaves it: beside much that must not leave the machine."""

from pathlib import Path

from dense_checkpoints import byte_level_tokenizer
from moe_checkpoints import make_model


CARD = "---\nlicense: apache-2.0\n---\n# A model\n\n![Loads](router_loads.png)\n<img src='figures/loads.png'>\n"
SECRETS = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
    ".env",
    ".cache/token",
    "checkpoint-10/model.safetensors",
    "checkpoint-10/optimizer.pt",
    "checkpoint-10/README.md",
    "runs/events.out.tfevents",
    "global_step10/mp_rank_00_model_states.pt",
    "pytorch_model_fsdp_0/__0_0.distcp",
    "optimizer_0/__0_0.distcp",
    "figures/.hidden.png",
    "figures/notes.txt",
    "figures/private.png",
    "additional_chat_templates/keys.txt",
    "private_photo.png",
    "notes.txt",
    "steal.py",
    "data.parquet",
    "model-00009-of-00009.safetensors",
)


def write_pushable(folder: Path) -> Path:
    """Write a checkpoint in three weight files, with its card and pictures, into `folder` and return it."""
    make_model("mixture").save_pretrained(folder, max_shard_size="100KB")
    byte_level_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "upcycling.json").write_text("{}", encoding="utf-8")
    (folder / "router_loads.png").write_bytes(b"picture")
    (folder / "figures").mkdir()
    (folder / "figures" / "loads.png").write_bytes(b"another picture")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}", encoding="utf-8")
    (folder / "LICENSE").write_text("Apache", encoding="utf-8")
    return folder


def leave_secrets(folder: Path) -> None:
    """Put into `folder` what must not leave the machine, and links to it."""
    for name in SECRETS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"secret of " + name.encode())
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "keys.json").write_bytes(b"secret outside")
    (folder / "results.json").symlink_to(outside / "keys.json")
    (folder / "NOTICE").symlink_to(folder / ".env")
    (folder / "linked").symlink_to(outside)
