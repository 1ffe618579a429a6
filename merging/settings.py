"""What a merge can be asked for. Imports nothing heavy: the command line shows the choices."""

from dataclasses import dataclass
from pathlib import Path

from ..common.settings import SettingsError
from ..common.text_settings import TextSettings


METHODS = ("average", "usage", "coefficients", "shared")


@dataclass(frozen=True)
class MergeSettings:
    """How the experts of each layer become one FFN.

    Args:
        method: `average`, all experts alike; `usage`, by what the routers weight them with on `text`; `coefficients`,
            those in a file; `shared`, the shared expert alone.
        coefficients: the file of `coefficients`.
        text: the text of `usage`.

    Raises:
        SettingsError: if the method lacks what it needs, or has what it has no use for.
    """

    method: str = "average"
    coefficients: Path | None = None
    text: TextSettings | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"method={self.method!r}: choose one of {', '.join(METHODS)}.")
        for method, name, value in (("coefficients", "a file", self.coefficients), ("usage", "text", self.text)):
            flag = "--coefficients" if method == "coefficients" else "--data"
            if self.method == method and value is None:
                raise SettingsError(f"--method {method} needs {name}; give {flag}.")
            if self.method != method and value is not None:
                raise SettingsError(
                    f"{flag} has no meaning with --method {self.method}, only with {method}; leave it out."
                )
