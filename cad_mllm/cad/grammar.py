"""The syntax of command text as a finite automaton, and the mask of next tokens that follows from it.

`cad_mllm.cad.codec` says what the commands mean; this module says which texts are commands at all:

    program  = "N" feature , { ";" ( "N" | "J" | tool ) feature } ;
    tool     = ( "C" | "I" ) [ "1" .. "9" ] ;
    feature  = plane x "," y "," z "," width "," height extent profile { profile } ;
    plane    = "X" | "Y" | "Z" | "O" theta "," phi "," gamma "," ;
    extent   = ( "E" | "F" | "M" ) length | "T" length "," length ;
    profile  = ( "P" path | "R" disc ) { "Q" path | "D" disc } ;
    path     = u "," v segments ;
    segments = an arc, or two segments, at least; no "H" after "H", no "V" after "V" ;
    segment  = "H" u | "V" v | "L" u "," v | arc ;
    arc      = ( "A" | "B" ) u "," v "," sweep ;
    disc     = u "," v "," radius ;

Numbers are decimal, without sign or leading zero. With G the largest grid value (8 bits: 254, 10 bits: 1022)
and T the angle steps in a full turn (240, 720): x y z width height u v: 0..G; length radius: 1..G;
theta: 0..T/4; phi: 0..T-1; gamma: 0..T/4-1; sweep: 1..T/2.

Array suffix: V the tokens of a vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cad_mllm.errors import ConfigError


@dataclass(frozen=True)
class Levels:
    """What the numbers of a command text range over."""

    grid: int
    """Largest coordinate. Even, so that the middle of a span is a level."""
    turn: int
    """Angle steps in a full turn. 15, 30, 45 and 90 degrees are whole numbers of steps."""


LEVELS: Mapping[int, Levels] = {8: Levels(grid=254, turn=240), 10: Levels(grid=1022, turn=720)}
"""By bits."""

ENDED = -1
"""The state after the end-of-sequence token: nothing but that token may follow."""


def levels(bits: int) -> Levels:
    """The levels for 8 or 10 bits. Raises ConfigError for any other number."""
    if bits not in LEVELS:
        raise ConfigError(f"quantization_bits is {bits}: choose one of {', '.join(map(str, LEVELS))}")
    return LEVELS[bits]


@dataclass(frozen=True)
class _Number:
    """A place of the syntax where a number from `low` to `high` is read; then the text goes on at `then`."""

    low: int
    high: int
    then: str


_Place = dict[str, str] | _Number


def _sequence(name: str, bounds: Sequence[tuple[int, int]], then: str) -> dict[str, _Place]:
    """Places that read numbers with commas between them, the first of them called `name`."""
    places: dict[str, _Place] = {}
    for i, (low, high) in enumerate(bounds):
        here = name if i == 0 else f"{name} {i}"
        if i + 1 == len(bounds):
            places[here] = _Number(low, high, then)
        else:
            places[here] = _Number(low, high, f"{here} ,")
            places[f"{here} ,"] = {",": f"{name} {i + 1}"}
    return places


def _syntax(sizes: Levels) -> tuple[dict[str, _Place], set[str]]:
    """The places of the syntax with the characters that lead on from them, and those where a text may end."""
    coordinate, length = (0, sizes.grid), (1, sizes.grid)
    quarter, sweep = sizes.turn // 4, (1, sizes.turn // 2)
    plane = {"X": "frame", "Y": "frame", "Z": "frame", "O": "angles"}
    looped = {"P": "path", "R": "disc", "Q": "path", "D": "disc", ";": "operation"}
    arcs = {"A": "arc", "B": "arc"}
    places: dict[str, _Place] = {
        "start": {"N": "plane"},
        "operation": {"N": "plane", "J": "plane", "C": "tool", "I": "tool"},
        "tool": {**plane, **dict.fromkeys("123456789", "plane")},
        "plane": plane,
        **_sequence("angles", [(0, quarter), (0, sizes.turn - 1), (0, quarter - 1)], "angles end"),
        "angles end": {",": "frame"},
        **_sequence("frame", [coordinate] * 5, "extent"),
        "extent": {"E": "length", "F": "length", "M": "length", "T": "lengths"},
        **_sequence("length", [length], "profile"),
        **_sequence("lengths", [length] * 2, "profile"),
        "profile": {"P": "path", "R": "disc"},
        **_sequence("disc", [coordinate, coordinate, length], "looped"),
        "looped": dict(looped),
        **_sequence("path", [coordinate] * 2, "path begun"),
        "path begun": {"H": "first H", "V": "first V", "L": "first L", **arcs},
        **_sequence("arc", [coordinate, coordinate, sweep], "after A"),
        "after A": {"H": "H", "V": "V", "L": "L", **arcs, **looped},
    }
    for name, numbers in (("H", 1), ("V", 1), ("L", 2)):
        onward = {letter: letter for letter in "HVL" if letter != name or letter == "L"} | arcs
        places |= _sequence(f"first {name}", [coordinate] * numbers, f"after first {name}")
        places |= _sequence(name, [coordinate] * numbers, f"after {name}")
        places[f"after first {name}"] = dict(onward)
        places[f"after {name}"] = onward | looped
    return places, {"looped", "after A", "after H", "after V", "after L"}


@dataclass(frozen=True, eq=False)
class _Digits:
    """What may follow within a number: `ends` if it may stop here, and the digits that may come."""

    ends: bool
    then: tuple[tuple[str, "_Digits"], ...]


@cache
def _digits(low: int, high: int) -> _Digits:
    """The automaton of the numbers from `low` to `high`; equal continuations are one object."""

    last = _Digits(ends=True, then=())
    known: dict[tuple[bool, tuple[tuple[str, _Digits], ...]], _Digits] = {(True, ()): last}

    def after(value: int) -> _Digits:
        more = tuple((str(d), after(value * 10 + d)) for d in range(10) if value * 10 + d <= high)
        ends = low <= value <= high
        return known.setdefault((ends, more), _Digits(ends, more))

    first = tuple((str(d), after(d)) for d in range(1, 10) if d <= high)
    zero = (("0", last),) if low == 0 else ()
    return _Digits(ends=False, then=zero + first)


class CommandGrammar:
    """A deterministic automaton that reads command text character by character. States are small integers."""

    start: int = 0
    """The state before the first character."""

    def __init__(self, bits: int) -> None:
        places, may_end = _syntax(levels(bits))
        self._numbers: dict[tuple[str, _Digits | None], int] = {}
        self._edges: list[dict[str, int]] = []
        self._complete: list[bool] = []
        self._places, self._may_end = places, may_end
        self._state("start", None)

    def _state(self, place: str, digits: _Digits | None) -> int:
        """The number of a state: a place, or some digits into the number that is read before a place."""
        target = self._places[place]
        if isinstance(target, _Number) and digits is None:
            return self._state(target.then, _digits(target.low, target.high))
        key = place, digits
        if key in self._numbers:
            return self._numbers[key]
        state = self._numbers[key] = len(self._edges)
        edges: dict[str, int] = {}
        self._edges.append(edges)
        at_place = digits is None or digits.ends
        self._complete.append(at_place and place in self._may_end)
        if at_place:
            assert isinstance(target, dict), "a number is followed by a character"
            edges |= {char: self._state(then, None) for char, then in target.items()}
        if digits is not None:
            edges |= {digit: self._state(place, then) for digit, then in digits.then}
        return state

    def __len__(self) -> int:
        """Number of states."""
        return len(self._edges)

    @property
    def alphabet(self) -> frozenset[str]:
        """Every character that a command text can hold. All are ASCII."""
        return frozenset(char for edges in self._edges for char in edges)

    def advance(self, state: int, text: str) -> int | None:
        """The state after reading `text` from `state`; None if no command text goes on like that."""
        for char in text:
            following = self._edges[state].get(char)
            if following is None:
                return None
            state = following
        return state

    def is_complete(self, state: int) -> bool:
        """Whether the text read so far is a whole command text."""
        return self._complete[state]

    def expected(self, state: int) -> str:
        """The characters that may come next, sorted."""
        return "".join(sorted(self._edges[state]))

    def shortest_ways_out(self) -> list[str]:
        """By state: the shortest text that makes a whole; of equally short ones the first in the alphabet."""
        ways: list[str | None] = ["" if complete else None for complete in self._complete]
        while None in ways:  # each round finds those that are one character farther away
            found = list(ways)
            for state, edges in enumerate(self._edges):
                onward = [char + way for char, then in edges.items() if (way := ways[then]) is not None]
                if ways[state] is None and onward:
                    found[state] = min(onward)
            assert found != ways, "every text can be finished"
            ways = found
        return [way for way in ways if way is not None]


class TokenMasker:
    """Which tokens may come next, for a vocabulary.

    `vocabulary[i]` holds the bytes that token i appends to the text; None (special tokens) and empty ones are
    never allowed. The end-of-sequence token is allowed exactly where the text is complete, and alone after
    itself.
    Masks are computed on first use of a state (some milliseconds) and kept.
    """

    def __init__(
        self, grammar: CommandGrammar, vocabulary: Sequence[bytes | None], eos_token_id: int
    ) -> None:
        if not 0 <= eos_token_id < len(vocabulary):
            raise ConfigError(
                f"eos_token_id {eos_token_id} is outside of the vocabulary of {len(vocabulary)}"
            )
        self._grammar, self._size, self._eos = grammar, len(vocabulary), eos_token_id
        alphabet = "".join(sorted(grammar.alphabet)).encode("ascii")
        self.texts: dict[int, str] = {  # of the tokens that can be part of a command text
            index: token.decode("ascii")
            for index, token in enumerate(vocabulary)
            if token and index != eos_token_id and not token.strip(alphabet)
        }
        missing = grammar.alphabet - set(self.texts.values())
        if missing:
            raise ConfigError(
                f"the tokenizer has no token for {' '.join(sorted(missing))} alone: "
                "command text cannot be generated with it under the grammar"
            )
        self._masks: dict[int, NDArray[np.bool_]] = {}

    def allowed(self, state: int) -> NDArray[np.bool_]:
        """The tokens that may come next, (V,) bool, read-only. At least one is allowed in every state."""
        if state not in self._masks:
            mask_V = np.zeros(self._size, dtype=np.bool_)
            if state == ENDED:
                mask_V[self._eos] = True
            else:
                advance = self._grammar.advance
                mask_V[[i for i, text in self.texts.items() if advance(state, text) is not None]] = True
                mask_V[self._eos] = self._grammar.is_complete(state)
            mask_V.setflags(write=False)
            self._masks[state] = mask_V
        return self._masks[state]

    def advance(self, state: int, token_id: int) -> int:
        """The state after an allowed token; `ENDED` after the end-of-sequence token."""
        assert self.allowed(state)[token_id], f"token {token_id} is not allowed in state {state}"
        if token_id == self._eos:
            return ENDED
        following = self._grammar.advance(state, self.texts[token_id])
        assert following is not None
        return following


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer, slow or fast."""

    all_special_ids: list[int]

    def get_vocab(self) -> dict[str, int]:
        """Every token, added ones included, with its id."""

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens with their ids."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The tokens as the vocabulary writes them."""


def vocabulary_bytes(tokenizer: Tokenizer, size: int | None = None) -> list[bytes | None]:
    """The bytes that each token of a Hugging Face tokenizer appends to a text; None for special and added
    ones.

    Knows byte-level vocabularies (GPT-2, Qwen3, Llama 3: a printable character for each byte) and
    SentencePiece ones (Llama 2, Gemma: U+2581 for a space, `<0x0A>` for a byte). `size` pads with None to the
    width of the logits, which is often larger than the vocabulary. Raises ConfigError for a smaller one.
    """
    vocabulary = tokenizer.get_vocab()
    count = max(vocabulary.values(), default=-1) + 1
    if size is not None and size < count:
        raise ConfigError(f"the tokenizer has {count} tokens, the model's logits only {size}")
    left_out = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    plain = {token: index for token, index in vocabulary.items() if index not in left_out}
    as_bytes = _byte_level if _is_byte_level(plain) else _sentencepiece
    found: list[bytes | None] = [None] * (count if size is None else size)
    for token, index in plain.items():
        found[index] = as_bytes(token)
    return found


_BYTE_CHARACTERS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""The bytes that byte-level vocabularies write as themselves; the others are U+0100 and on, in order."""


@cache
def _byte_of_character() -> Mapping[str, int]:
    hidden = (byte for byte in range(256) if byte not in _BYTE_CHARACTERS)
    return {chr(byte): byte for byte in _BYTE_CHARACTERS} | {
        chr(0x100 + i): byte for i, byte in enumerate(hidden)
    }


def _is_byte_level(vocabulary: Mapping[str, int]) -> bool:
    """Whether the vocabulary holds the character of every byte, as byte-level ones do."""
    return _byte_of_character().keys() <= vocabulary.keys()


def _byte_level(token: str) -> bytes | None:
    table = _byte_of_character()
    return bytes(table[char] for char in token) if all(char in table for char in token) else None


def _sentencepiece(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("\u2581", " ").encode("utf-8", errors="surrogatepass")
