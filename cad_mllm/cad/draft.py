"""A command text while it is written, token by token, so that what comes out is a program.

The automaton of `cad_mllm.cad.grammar` keeps the syntax. Here is what it cannot keep, having no memory: every
feature encloses an area (what is left to mean once curves close by themselves, radii and lengths are above 0
and the first operation is New), and the text ends within the tokens that are left.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cad_mllm.cad import codec
from cad_mllm.cad.grammar import ENDED, CommandGrammar, TokenMasker, levels
from cad_mllm.errors import CadError, ConfigError

RESERVE = 96
"""With fewer tokens left than this, a draft looks at what it takes to end."""

_AFTER_A_LOOP = ";PQRD"
"""The characters that close the loop before them; so does the end."""
_GROWTH = 32
"""More characters than one token can add to the shortest way to the end."""
_POINT_FRAME = re.compile(r",0,0[EFMT]")
"""A frame without width and height: its paths are points."""

TokenIds = NDArray[np.int64]


class Drafts:
    """Begins drafts for one vocabulary, and keeps what they share: the tokens that each situation allows.

    `vocabulary` and `eos_token_id` as in `TokenMasker`.
    """

    def __init__(self, bits: int, vocabulary: Sequence[bytes | None], eos_token_id: int) -> None:
        self.bits = bits
        self.grammar = CommandGrammar(bits)
        self.masker = TokenMasker(self.grammar, vocabulary, eos_token_id)
        self.eos = eos_token_id
        self.end_alone: TokenIds = np.array([eos_token_id])
        self._ways_out = self.grammar.shortest_ways_out()
        self._known: dict[tuple[int, str], tuple[TokenIds, tuple[int, ...]]] = {}
        self._by_text = {text: token for token, text in self.masker.texts.items()}
        self._prefixes: dict[str, TokenIds] = {}

    @property
    def shortest(self) -> int:
        """Tokens that any program can be written with, the end included: the least limit of a text."""
        return len(self._ways_out[self.grammar.start]) + 1

    def begin(self, text: str = "", *, limit: int) -> "Draft":
        """A draft that goes on behind `text` for at most `limit` tokens, the end included.

        Raises CadError if no program begins like that, ConfigError if `limit` leaves no room for its end.
        """
        draft = Draft(self, limit)
        for place, char in enumerate(text):
            if not draft.accepts(char):
                raise CadError(
                    f"no program begins like that: character {place}, {text[place]!a} behind "
                    f"{text[max(0, place - 12) : place]!a}"
                )
            draft.read(char)
        needed = len(draft.way_out()) + 1
        if limit < needed:
            raise ConfigError(
                f"a limit of {limit} tokens is too low: the end alone may take {needed}; "
                "raise --max_new_tokens"
            )
        return draft

    def allowed(self, state: int, barred: str) -> tuple[TokenIds, tuple[int, ...]]:
        """The tokens that the syntax allows and that do not begin with a barred character; the end is barred
        with ";". Behind them those among them that close a loop after their first character."""
        key = state, barred
        if key not in self._known:
            texts = self.masker.texts
            tokens = [
                int(token)
                for token in np.flatnonzero(self.masker.allowed(state))
                if (";" not in barred if token == self.eos else texts[int(token)][0] not in barred)
            ]
            late = [t for t in tokens if t != self.eos and set(texts[t][1:]) & set(_AFTER_A_LOOP)]
            self._known[key] = np.array(tokens, dtype=np.int64), tuple(late)
        return self._known[key]

    def prefixes_of(self, text: str) -> TokenIds:
        """The tokens that write the beginning of `text`, or the end if it is empty."""
        if not text:
            return self.end_alone
        if text not in self._prefixes:
            beginnings = (text[: i + 1] for i in range(len(text)))
            found = [self._by_text[beginning] for beginning in beginnings if beginning in self._by_text]
            self._prefixes[text] = np.array(found, dtype=np.int64)
        return self._prefixes[text]

    def way_out(self, state: int) -> str:
        """The shortest text that ends a command text, by its syntax."""
        return self._ways_out[state]


class Draft:
    """One text that is being written; made by `Drafts.begin`."""

    def __init__(self, drafts: Drafts, limit: int) -> None:
        self._drafts = drafts
        self._left = limit
        self._state = drafts.grammar.start
        self._feature = ""
        """What stands behind the last ";"."""
        self._is_sound = False
        """Its first loop is closed and encloses an area; or is a circle, which does."""
        self._in_path = False
        self._ending: str | None = None
        """What is still to be written, once the tokens that are left allow nothing else."""

    @property
    def is_ended(self) -> bool:
        """The end-of-sequence token was written."""
        return self._state == ENDED

    @property
    def was_cut(self) -> bool:
        """The limit decided how the text ends."""
        return self._ending is not None

    def allowed(self) -> TokenIds:
        """The tokens that may come next; at least one."""
        if self.is_ended:
            return self._drafts.end_alone
        if self._ending is None and self._left <= RESERVE:
            way_out = self.way_out()
            if len(way_out) + 1 + _GROWTH >= self._left:
                self._ending = way_out
        if self._ending is not None:
            return self._drafts.prefixes_of(self._ending)
        tokens, late = self._drafts.allowed(self._state, self._barred())
        refused = [token for token in late if not self._survives(self._drafts.masker.texts[token])]
        return tokens[~np.isin(tokens, refused)] if refused else tokens

    def append(self, token: int) -> None:
        """Write an allowed token."""
        assert self._left > 0 and not self.is_ended
        self._left -= 1
        if token == self._drafts.eos:
            self._state = ENDED
            return
        text = self._drafts.masker.texts[token]
        if self._ending is not None:
            assert self._ending.startswith(text), f"{text!a} is not allowed"
            self._ending = self._ending[len(text) :]
        for char in text:
            self.read(char)

    def accepts(self, char: str) -> bool:
        """Whether the text may go on with this character."""
        return self._drafts.grammar.advance(self._state, char) is not None and char not in self._barred()

    def read(self, char: str) -> None:
        """Go on with an accepted character."""
        state = self._drafts.grammar.advance(self._state, char)
        assert state is not None
        self._state = state
        if char in _AFTER_A_LOOP:
            self._is_sound = self._is_sound or self._in_path or char == "R"
            self._in_path = not self._is_sound and char == "P"
        if char == ";":
            self._feature, self._is_sound, self._in_path = "", False, False
        else:
            self._feature += char

    def _barred(self) -> str:
        """The characters that the syntax may allow here and the meaning does not; ";" bars the end too."""
        if self._is_sound:
            return ""
        if self._in_path:
            closes = self._drafts.grammar.is_complete(self._state)
            return _AFTER_A_LOOP if closes and not self._encloses() else ""
        return "P" if _POINT_FRAME.search(self._feature) else ""

    def _encloses(self, more: str = "") -> bool:
        return codec.is_feature(self._feature + more, self._drafts.bits)

    def _survives(self, text: str) -> bool:
        ahead = Draft(self._drafts, self._left)
        ahead._state, ahead._feature = self._state, self._feature
        ahead._is_sound, ahead._in_path = self._is_sound, self._in_path
        for char in text:
            if not ahead.accepts(char):
                return False
            ahead.read(char)
        return True

    def way_out(self) -> str:
        """A short text that makes this a program."""
        shortest = self._drafts.way_out(self._state)
        # The shortest way out of a frame is a circle: only a path that was begun may enclose nothing.
        if self._is_sound or not (self._in_path or "P" in shortest):
            return shortest
        return next(shortest + more for more in self._detours() if self._encloses(shortest + more))

    def _detours(self) -> Iterator[str]:
        """Segments that give a path an area, whatever it was: shorter ones first."""
        sizes = levels(self._drafts.bits)
        corners = [f"{u},{v}" for u in (0, sizes.grid) for v in (0, sizes.grid)]
        one = [f"L{corner}" for corner in corners] + [f"A{corner},{sizes.turn // 4}" for corner in corners]
        yield ""
        yield from one
        yield from (first + second for first in one for second in one)
