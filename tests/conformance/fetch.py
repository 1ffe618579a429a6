"""Fetch Transformers' own model tests, at the installed version, for `test_conformance.py`.

They are in the source distribution on the package index only, not in the installed package. Run once for each
version, where the index can be reached:

    python tests/conformance/fetch.py
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers-tests"


def fetched_tests() -> Path:
    """Return the folder that holds, or would hold, the tests of the installed version."""
    return CACHE / version("transformers")


def fetch() -> Path:
    """Download the source distribution, keep the common tests, and return their folder."""
    target = fetched_tests()
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE.parent / ".gitignore").write_text("*\n")
    requirement = f"transformers=={version('transformers')}"
    with tempfile.TemporaryDirectory(dir=CACHE) as download:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-binary", "transformers", "--dest", download, requirement], check=True)
        [archive] = Path(download).glob("*.tar.gz")
        unpacked = Path(download) / "tests"
        unpacked.mkdir()
        with tarfile.open(archive) as source:
            for member in source:
                _, _, path = member.name.partition("/")
                if member.isfile() and Path(path).parent == Path("tests") and path.endswith(".py"):
                    (unpacked / Path(path).name).write_bytes(source.extractfile(member).read())
        # The configuration tests import a package from the folder that they are in.
        (unpacked / "__init__.py").touch()
        unpacked.rename(target)
    return target


if __name__ == "__main__":
    print(fetch())
