"""Entry point of `upcycled-moe`."""


def main() -> None:
    raise SystemExit("upcycled-moe: no command is available yet.")
