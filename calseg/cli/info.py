"""What ``calseg info`` prints. PyTorch, which takes seconds, is imported only if asked for."""

from __future__ import annotations

import json

from calseg.installation import installed


def print_info(*, as_json: bool, runtime: bool) -> None:
    """Print what is installed, or all that :func:`calseg.info` returns, as JSON or one line per entry."""
    if runtime:
        from calseg.environment import info

        content = info()
    else:
        content = installed()
    if as_json:
        print(json.dumps(content, indent=2))
        return
    width = max(map(len, content))
    for name, value in content.items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:{width}}  {'-' if text in (None, '') else text}")
