"""How close a program is to the true one, command by command, and whether it is new.

Both are compared as canonical command text (`cad_mllm.cad.codec`) of `BITS` bits: programs that differ only
in the order of loops, the start of a path or the choice of axes are the same.
"""

import hashlib
import re
from dataclasses import dataclass

from cad_mllm.cad import codec
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import CadProgram

BITS = 8
TOLERANCE = 3
"""Quantisation steps within which a parameter is right (DeepCAD's eta, of 256 levels)."""

_COMMAND = re.compile(r"([A-Z])([0-9,]*)")


@dataclass(frozen=True, kw_only=True)
class ProgramMatch:
    """Of a prediction and the truth."""

    command_accuracy: float
    """Share of the true commands whose kind is the same in the same place of the prediction; 0 to 1."""
    parameter_accuracy: float | None
    """Share of the parameters of those commands that are off by less than `TOLERANCE` steps; 0 to 1.

    None where no command is right.
    """


def canonical(program: CadProgram) -> str:
    """The text that stands for a program. Raises CadError for a program that is too small or too fine."""
    return codec.encode(normalise(program).program, bits=BITS)


def commands(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Letters and parameters of a command text: operation, plane with frame, extent, loops, segments."""
    return [
        (letter, tuple(int(number) for number in numbers.split(",") if number))
        for letter, numbers in _COMMAND.findall(text)
    ]


def compare(predicted: str, true: str) -> ProgramMatch:
    """ACC_cmd and ACC_param of two canonical texts.

    As in DeepCAD (Wu, Xiao, Zheng, ICCV 2021, section 4.1): commands are compared place by place over the
    length of the truth, parameters only of the commands whose kind is right, over all of their number.
    What DeepCAD has as a parameter and must be exact (boolean operation, kind of extent), is a command here.
    """
    wanted, got = commands(true), commands(predicted)
    same_kind = [(w, g) for w, g in zip(wanted, got, strict=False) if w[0] == g[0]]
    parameters = sum(len(want[1]) for want, _ in same_kind)
    right = sum(
        abs(a - b) < TOLERANCE for want, have in same_kind for a, b in zip(want[1], have[1], strict=False)
    )
    return ProgramMatch(
        command_accuracy=len(same_kind) / len(wanted),
        parameter_accuracy=right / parameters if parameters else None,
    )


def fingerprint(canonical_text: str) -> str:
    """Short hash of a canonical text: programs are the same at `BITS` bits exactly if theirs are equal."""
    return hashlib.sha256(canonical_text.encode("ascii")).hexdigest()[:32]
