"""The few training flags that the launcher must know before it starts the trainer, which checks them all."""

from collections.abc import Sequence
from pathlib import Path

import yaml


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """What `--name` will be: from the flags, else from the `--config` file, else None.

    A file that cannot be read counts as empty here: the trainer says what is wrong with it.
    """
    given = _given(argv, name)
    if given is not None:
        return given
    config = _given(argv, "config")
    if config is None:
        return None
    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    value = values.get(name) if isinstance(values, dict) else None
    return None if value is None else str(value)


def _given(argv: Sequence[str], name: str) -> str | None:
    found = None
    for position, word in enumerate(argv):
        if word.startswith(f"--{name}="):
            found = word.split("=", 1)[1]
        elif word == f"--{name}" and position + 1 < len(argv):
            found = argv[position + 1]
    return found
