"""`report.json`: no more digits than mean something, and a line a row, so that two reports can be compared."""

import json
import math
from typing import Any


SIGNIFICANT_DIGITS = 6


def rounded(content: Any) -> Any:
    """Return `content` with its numbers at 6 significant digits, and None for those that are not finite."""
    if isinstance(content, dict):
        return {str(key): rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value) for value in content]
    if isinstance(content, float):
        return float(f"{content:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(content) else None
    return content


def format_json(content: Any, indent: str = "") -> str:
    """Return `content` as JSON; a list or object that holds no other stands on one line."""
    inner = f"{indent} "
    values = content.values() if isinstance(content, dict) else content
    if not isinstance(content, dict | list) or not any(isinstance(value, dict | list) for value in values):
        return _scalar(content)
    if isinstance(content, dict):
        rows = [f"{inner}{_scalar(key)}: {format_json(value, inner)}" for key, value in content.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + format_json(value, inner) for value in content) + f"\n{indent}]"


def _scalar(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False)
