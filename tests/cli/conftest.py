"""A checkpoint and a text for the commands; nobody may write into them."""

import pytest
from dense_checkpoints import sample_text, write_dense


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Folder of a dense Qwen2 checkpoint."""
    return write_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A text file of some 30,000 tokens."""
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text(sample_text(), encoding="utf-8")
    return path


@pytest.fixture
def upcycled_moe(capfd):
    """`upcycled_moe("plan", …)`: run the command line; gives exit status, stdout and stderr."""
    from upcycled_moe.cli.main import main

    def run(*arguments):
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        output = capfd.readouterr()
        return status, output.out, output.err

    return run
