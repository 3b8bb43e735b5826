"""JSON files from outside: loaded with care, and their values taken out with a word on what is wrong.

`where` is the place in the file, as a person would call it: every message begins with it or ends in it.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import NoReturn, TypeVar

from cad_mllm.cad.program import Vec3
from cad_mllm.errors import CadError

MAX_FILE_BYTES = 20_000_000
"""Larger JSON files are refused unread."""
MAX_NUMBER = 1e9
"""Largest coordinate, length or angle, in the file's unit."""

_Choice = TypeVar("_Choice")


def load(path: FilePath) -> Mapping[str, object]:
    """The object in a JSON file. Raises CadError, without the file's name, for whatever is not one."""
    try:
        check_size(path.stat().st_size)
        return loads(path.read_bytes())
    except OSError as error:
        raise CadError(f"cannot be read: {error.strerror or error}") from error


def check_size(size: int) -> None:
    """Raises CadError for a file too large to be read, by its size in bytes."""
    if size > MAX_FILE_BYTES:
        raise CadError(f"{size:,} bytes are more than the {MAX_FILE_BYTES:,} that a CAD JSON file may have")


def loads(content: bytes) -> Mapping[str, object]:
    """The object in the content of a JSON file. Raises CadError for whatever is not one."""
    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise CadError(f"is not UTF-8 text: byte {error.start} is wrong; save it as UTF-8 JSON") from error
    except RecursionError as error:
        raise CadError("is nested too deep for a CAD JSON file") from error
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        raise CadError(f"is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CadError(f"holds a JSON {type(data).__name__} instead of an object with entities and sequence")
    return data


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise CadError(f"the key {shown(twice)} is given twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise CadError(f"{name} is not a number that a CAD JSON file may hold")


def shown(name: str) -> str:
    """A name from the file, short and on one line."""
    return ascii(name if len(name) <= 60 else name[:57] + "...")


def as_mapping(value: object, where: str) -> Mapping[str, object]:
    """`value`, if it is a JSON object."""
    if not isinstance(value, dict):
        raise CadError(f"{where} is a {type(value).__name__} where an object is needed")
    return value


def _get(data: Mapping[str, object], key: str, where: str) -> object:
    if key not in data:
        raise CadError(f"{where} has no {shown(key)}")
    return data[key]


def mapping(data: Mapping[str, object], key: str, where: str) -> Mapping[str, object]:
    """The JSON object at `key`."""
    found = data.get(key)
    if isinstance(found, dict):
        return found
    return as_mapping(_get(data, key, where), f"{shown(key)} of {where}")


def elements(data: Mapping[str, object], key: str, where: str) -> list[object]:
    """The list at `key`."""
    value = _get(data, key, where)
    if not isinstance(value, list):
        raise CadError(f"{shown(key)} of {where} is a {type(value).__name__} where a list is needed")
    return value


def text(data: Mapping[str, object], key: str, where: str) -> str:
    """The text at `key`."""
    value = _get(data, key, where)
    if not isinstance(value, str):
        raise CadError(f"{shown(key)} of {where} is a {type(value).__name__} where a text is needed")
    return value


def choice(data: Mapping[str, object], key: str, choices: Mapping[str, _Choice], where: str) -> _Choice:
    """What the text at `key` stands for."""
    value = text(data, key, where)
    if value not in choices:
        raise CadError(f"{shown(key)} of {where} is {shown(value)}: supported are {', '.join(choices)}")
    return choices[value]


def number(data: Mapping[str, object], key: str, where: str) -> float:
    """The number at `key`, within +-`MAX_NUMBER`."""
    value = _get(data, key, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CadError(f"{shown(key)} of {where} is a {type(value).__name__} where a number is needed")
    if not -MAX_NUMBER <= value <= MAX_NUMBER:  # false for NaN too
        raise CadError(f"{shown(key)} of {where} is not a number between -{MAX_NUMBER:g} and {MAX_NUMBER:g}")
    return float(value)


def vector(data: Mapping[str, object], key: str, where: str) -> Vec3:
    """x, y and z of the object at `key`."""
    value = data.get(key)
    if isinstance(value, dict):  # whoever reads many vectors pays for their names only where one is wrong
        x, y, z = value.get("x"), value.get("y"), value.get("z")
        if (
            (type(x) is float and -MAX_NUMBER <= x <= MAX_NUMBER)
            and (type(y) is float and -MAX_NUMBER <= y <= MAX_NUMBER)
            and (type(z) is float and -MAX_NUMBER <= z <= MAX_NUMBER)
        ):
            return x, y, z
    value = mapping(data, key, where)
    where = f"{shown(key)} of {where}"
    return number(value, "x", where), number(value, "y", where), number(value, "z", where)
