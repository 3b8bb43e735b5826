"""The syntax of command text, and the mask that keeps a generator within it."""

import random
import re
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cad_mllm.cad import codec
from cad_mllm.cad.grammar import ENDED, CommandGrammar, TokenMasker, levels, vocabulary_bytes
from cad_mllm.errors import CadError, ConfigError
from cad_mllm.model.presets import byte_tokenizer

BITS = [8, 10]
GRAMMARS = {bits: CommandGrammar(bits) for bits in BITS}
SINGLES: list[bytes | None] = [bytes([byte]) for byte in range(256)]
LONGER: list[bytes | None] = [b"NZ", b"0,0", b"254", b"H254V", b";NZ", b"0;C", b"NN", b"00", b"0 ", b"", None]
VOCABULARY = [*SINGLES, *LONGER]
EOS = len(VOCABULARY) - 1


def number(low: int, high: int) -> str:
    return "(?:" + "|".join(map(str, range(high, low - 1, -1))) + ")"


def pattern(bits: int) -> re.Pattern[str]:
    """The grammar once more, as a regular expression written by hand from its documentation."""
    top, turn = levels(bits).grid, levels(bits).turn
    c, n = number(0, top), number(1, top)
    arc = f"[AB]{c},{c},{number(1, turn // 2)}"
    start = f"{c},{c}"
    segments = (
        f"(?:(?:{arc}|H{c}(?=[^H])|V{c}(?=[^V])|L{c},{c})(?:{arc}|H{c}(?!H)|V{c}(?!V)|L{c},{c})+|{arc})"
    )
    disc = f"{c},{c},{n}"
    profile = f"(?:P{start}{segments}|R{disc})(?:Q{start}{segments}|D{disc})*"
    oblique = f"O{number(0, turn // 4)},{number(0, turn - 1)},{number(0, turn // 4 - 1)},"
    feature = f"(?:[XYZ]|{oblique}){c},{c},{c},{c},{c}(?:[EFM]{n}|T{n},{n})(?:{profile})+"
    return re.compile(f"N{feature}(?:;(?:[NJ]|[CI][1-9]?){feature})*")


PATTERNS = {bits: pattern(bits) for bits in BITS}


def walk(grammar: CommandGrammar, rng: random.Random, length: int) -> str:
    """A random text: at least so long, then as soon as it is complete."""
    state, text = grammar.start, ""
    while len(text) < length or not grammar.is_complete(state):
        char = rng.choice(grammar.expected(state))
        following = grammar.advance(state, char)
        assert following is not None
        state, text = following, text + char
    return text


def accepts(grammar: CommandGrammar, text: str) -> bool:
    state = grammar.advance(grammar.start, text)
    return state is not None and grammar.is_complete(state)


# --- the automaton ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(30))
def test_the_automaton_agrees_with_a_regular_expression(bits: int, seed: int):
    grammar, rng = GRAMMARS[bits], random.Random(seed)
    text = walk(grammar, rng, rng.randint(1, 120))
    assert PATTERNS[bits].fullmatch(text)
    alphabet = sorted(grammar.alphabet)
    for _ in range(30):
        at = rng.randrange(len(text))
        changed = text[:at] + rng.choice([*alphabet, ""]) + text[at + rng.randint(0, 1) :]
        assert accepts(grammar, changed) == bool(PATTERNS[bits].fullmatch(changed)), changed


@pytest.mark.parametrize("bits", BITS)
def test_numbers_stay_in_their_range(bits: int):
    grammar, top = GRAMMARS[bits], levels(bits).grid
    for value in range(0, 2 * top):
        assert accepts(grammar, f"NZ{value},0,0,0,0E1R0,0,1") == (value <= top)
        assert accepts(grammar, f"NZ0,0,0,0,0E{value}R0,0,1") == (1 <= value <= top)
    assert not accepts(grammar, "NZ00,0,0,0,0E1R0,0,1")


@pytest.mark.parametrize("bits", BITS)
def test_no_state_is_a_dead_end_and_every_text_can_be_finished(bits: int):
    grammar = GRAMMARS[bits]
    finishing = {state for state in range(len(grammar)) if grammar.is_complete(state)}
    while True:
        more = {
            state
            for state in range(len(grammar))
            if any(grammar.advance(state, char) in finishing for char in grammar.expected(state))
        }
        if more <= finishing:
            break
        finishing |= more
    assert finishing == set(range(len(grammar)))


def test_the_grammar_is_small():
    assert len(GRAMMARS[10]) < 300  # so that a mask per state costs little


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(20))
def test_most_texts_of_the_grammar_are_programs(bits: int, seed: int):
    rng = random.Random(seed)
    decoded = 0
    for _ in range(10):
        try:
            codec.decode(walk(GRAMMARS[bits], rng, rng.randint(1, 150)), bits)
            decoded += 1
        except CadError as error:
            assert "area" in str(error)  # the one thing that syntax cannot promise
    assert decoded >= 6


def test_unknown_bits():
    with pytest.raises(ConfigError, match="quantization_bits"):
        CommandGrammar(12)


# --- the mask ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masker() -> TokenMasker:
    return TokenMasker(GRAMMARS[8], VOCABULARY, EOS)


def tokens(masker: TokenMasker, state: int) -> set[bytes | None]:
    return {VOCABULARY[i] for i in np.flatnonzero(masker.allowed(state))}


def test_a_token_is_allowed_where_its_text_goes_on_legally(masker: TokenMasker):
    grammar = GRAMMARS[8]
    assert tokens(masker, grammar.start) == {b"N", b"NZ"}
    for text in (
        "NZ",
        "NZ0,0,127,254,254E60P0,0",
        "NZ0,0,127,254,254E60P0,0H254V254",
        "NZ127,127,127,0,0E2R0,0,1",
    ):
        state = grammar.advance(0, text)
        assert state is not None
        for index, token in enumerate(VOCABULARY[:EOS]):
            legal = bool(token) and grammar.advance(state, token.decode("latin-1")) is not None
            assert masker.allowed(state)[index] == legal, (text, token)


def test_tokens_may_span_commands(masker: TokenMasker):
    state = GRAMMARS[8].advance(0, "NZ127,127,127,0,0E2R0,0,1")
    assert state is not None
    assert {b";NZ", b"0;C", b"254", b"0"} & tokens(masker, state) == {b";NZ", b"0;C", b"0"}


def test_the_end_is_allowed_exactly_where_the_text_is_complete_and_nothing_follows_it(masker: TokenMasker):
    grammar = GRAMMARS[8]
    for state in range(len(grammar)):
        assert masker.allowed(state)[EOS] == grammar.is_complete(state)
    complete = grammar.advance(0, "NZ127,127,127,0,0E2R0,0,1")
    assert complete is not None
    assert masker.advance(complete, EOS) == ENDED
    assert np.flatnonzero(masker.allowed(ENDED)).tolist() == [EOS]
    assert masker.advance(ENDED, EOS) == ENDED


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_drawn_under_the_mask_is_command_text(masker: TokenMasker, seed: int):
    rng = random.Random(seed)
    state, text = GRAMMARS[8].start, b""
    for _ in range(10_000):
        token = rng.choice(np.flatnonzero(masker.allowed(state)).tolist())
        state = masker.advance(state, token)
        if state == ENDED:
            break
        text += VOCABULARY[token] or b""
    assert state == ENDED
    assert accepts(GRAMMARS[8], text.decode("ascii"))


def test_masks_are_kept_and_cannot_be_changed(masker: TokenMasker):
    mask = masker.allowed(0)
    assert masker.allowed(0) is mask
    with pytest.raises(ValueError, match="read-only"):
        mask[0] = True


def test_a_vocabulary_of_real_size_is_fast():
    rng = random.Random(0)
    alphabet = "0123456789,;NJCIXYZOEFMTPQRDHLVABabcdef "
    vocabulary = [
        *SINGLES,
        *("".join(rng.choices(alphabet, k=rng.randint(2, 6))).encode() for _ in range(151_680)),
    ]
    masker = TokenMasker(GRAMMARS[8], vocabulary, 0)
    begin = time.perf_counter()
    for state in range(5):
        masker.allowed(state)
    assert time.perf_counter() - begin < 5.0


def test_a_vocabulary_without_the_single_characters_is_refused():
    with pytest.raises(ConfigError, match="no token for 7"):
        TokenMasker(GRAMMARS[8], [token for token in VOCABULARY if token != b"7"], 0)


def test_an_end_token_outside_of_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="eos_token_id"):
        TokenMasker(GRAMMARS[8], SINGLES, 256)


# --- tokenizers -------------------------------------------------------------------------------------------


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A Llama-2-like tokenizer: U+2581 for spaces, and bytes of their own."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁N", "NZ", "é"]
    vocab = [(piece, 0.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_byte_level_vocabularies():
    tokenizer = byte_tokenizer()
    vocabulary = vocabulary_bytes(tokenizer, size=320)
    assert vocabulary[:256] == SINGLES
    assert vocabulary[256:] == [None] * 64  # special tokens, and logits that stand for nothing


def test_sentencepiece_vocabularies():
    vocabulary = vocabulary_bytes(sentencepiece_like())
    assert vocabulary[:3] == [None, None, None]
    assert vocabulary[3:259] == SINGLES
    assert vocabulary[259:] == [b" ", b" N", b"NZ", "é".encode()]


def test_added_tokens_are_not_text():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "NZ0"])
    assert vocabulary_bytes(tokenizer)[-2:] == [None, None]


def test_logits_that_are_too_narrow_are_refused():
    with pytest.raises(ConfigError, match="258"):
        vocabulary_bytes(byte_tokenizer(), size=100)


def test_the_tiny_presets_tokenizer_is_masked_end_to_end():
    tokenizer = byte_tokenizer()
    masker = TokenMasker(GRAMMARS[8], vocabulary_bytes(tokenizer), tokenizer.eos_token_id)
    text = "NZ0,0,127,254,254E60P0,0H254V254H0;JZ0,0,0,0,0E1R0,0,9"
    state = GRAMMARS[8].start
    for token in tokenizer(text).input_ids:
        assert masker.allowed(state)[token]
        state = masker.advance(state, token)
    assert masker.allowed(state)[tokenizer.eos_token_id]
