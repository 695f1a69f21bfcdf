"""Whole words among a byte-level BPE's tokens; the small functions that choose, exchange and hide words of a batch."""

import pytest
import torch

import data
import language
from common import UserError

SAYS = ["a red dog runs", "two dogs are running by the box", "Dog and dogs run", "the boxes are red", "red bus",
        "dogs run", "a dog on the box", "run to the red box"]  # fmt: skip
TOK = language.Tokenizer.train(SAYS * 5, 400, kind="roberta")


def luck(seed=0):
    return torch.Generator().manual_seed(seed)


def number(token):
    return TOK.backend.token_to_id(token)


# ---------------------------------------------------------------------------------------------------------------------
# language: word_tables, stem


@pytest.mark.parametrize(
    "words",
    ["box boxes Box boxing boxed", "run running runs", "dog dogs Dogs", "bake baked baking bakes", "horse horses",
     "glass glasses", "dress dresses dressed dressing", "bus buses", "tree trees", "fall falling falls", "shoe shoes",
     "see sees seeing", "stop stopped stopping",
     "coffee coffees"],
)  # fmt: skip
def test_words_that_are_the_same_in_another_form(words):
    assert len({language.stem(word) for word in words.split()}) == 1


def test_words_that_differ():
    """What is short or only looks like an ending stays: "red" is no form of "r", "glass" none of "glas" the plural."""
    words = "red bed ring sing bus gas yes dog cat star starry box boxy round string one two grey green".split()
    assert len({language.stem(word) for word in words}) == len(words)


def test_tables_by_hand():
    tables = language.word_tables(TOK, TOK.vocab_size)
    first, later, starts, stop, stem = (tables[name] for name in ("first", "later", "starts", "stop", "stem"))
    assert all(x.shape == (TOK.vocab_size,) for x in tables.values())
    named = {i: token for token, i in TOK.backend.get_vocab().items()}
    for i, token in named.items():
        assert starts[i] == (token[0] == "Ġ" or i in (TOK.eos, TOK.pad)), token
        assert later[i] == (token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha()), token
        assert first[i] == (token.isascii() and token.isalpha() and f"Ġ{token}" in named.values()), token
    for word in ("Ġred", "Ġdog", "Ġbox", "Ġrun"):
        assert later[number(word)] and not first[number(word)] and not stop[number(word)]
    assert stop[[number("Ġthe"), number("Ġare"), number("a")]].all() and first[number("a")]
    assert stem[number("Ġdog")] == stem[number("Ġdogs")] != stem[number("Ġbox")]
    assert stem[number("a")] == stem[number("Ġa")]
    special = [TOK.bos, TOK.pad, TOK.eos, TOK.mask, 3]
    assert not (first | later | stop)[special].any()
    apart = stem[~(first | later)]
    assert len(apart.unique()) == len(apart) and apart.max() < 0 <= stem[first | later].min(), "no word: like none else"


def test_tables_of_a_larger_word_embedding():
    """Rows without a token (a checkpoint's table may have some) are no words; of a smaller one the rest is left out."""
    large, small = language.word_tables(TOK, TOK.vocab_size + 7), language.word_tables(TOK, 300)
    exact = language.word_tables(TOK, TOK.vocab_size)
    for name in ("first", "later", "starts", "stop"):
        assert torch.equal(large[name][:-7], exact[name]) and not large[name][-7:].any()
    assert len(large["stem"].unique()) == len(exact["stem"].unique()) + 7
    assert torch.equal(small["later"], exact["later"][:300])


def test_where_a_word_ends():
    """A token that a piece follows is no whole word: "dogx" is told from "dog" by `starts` alone."""
    tables = language.word_tables(TOK, TOK.vocab_size)
    ids = TOK.encode("a dog dogx")
    assert ids[1] == ids[2] == number("Ġdog")
    assert [bool(tables["starts"][i]) for i in ids[1:]] == [True, True, False]


def test_word_pieces_are_refused():
    with pytest.raises(UserError, match="no token of this tokenizer begins a word.*take RoBERTa's or GPT-2's kind"):
        language.word_tables(language.Tokenizer.train(SAYS * 5, 200, "wordpiece"), 200)


# ---------------------------------------------------------------------------------------------------------------------
# data: first_of, exchange, words_said, mask_words(at_least_one)


def test_first_of_by_hand():
    """The lowest `order` among those allowed; a number for all rows or one for each; fewer where there are no more."""
    order, may_be = torch.rand(50, 9, generator=luck()), torch.rand(50, 9, generator=luck(1)) < 0.4
    several = torch.randint(0, 5, (50,), generator=luck(2))
    for n in (1, 3, several):
        found = data.first_of(order, may_be, n)
        for r in range(50):
            places = sorted((order[r, t].item(), t) for t in range(9) if may_be[r, t])
            most = n if isinstance(n, int) else n[r].item()
            assert found[r].nonzero()[:, 0].tolist() == sorted(t for _, t in places[:most])
    assert not may_be.all(1).any() and (may_be.sum(1) < several).any()
    assert not data.first_of(order, torch.zeros_like(may_be), 2).any()


def test_exchange():
    """Rows change places as wholes and with one another, so none is lost; the others stay; 0 costs no luck."""
    ids = torch.arange(1000)
    for share in (0.2, 0.7, 1.0):
        found, twin = data.exchange(share, luck(3), ids, ids[:, None] * torch.tensor([1, 2]))
        assert torch.equal(found.sort().values, ids) and torch.equal(twin, found[:, None] * torch.tensor([1, 2]))
        assert (found != ids).float().mean().item() == pytest.approx(share, abs=0.05)
    generator = luck(4)
    (same,) = data.exchange(0.0, generator, ids)
    assert torch.equal(same, ids) and torch.equal(generator.get_state(), luck(4).get_state())


def test_words_said_of_a_picture():
    """Of all its captions together, each once, however often it is said; special tokens are said of none."""
    said = [["a red dog", "two dogs"], ["the box", "a box and a box"], ["red", "a red bus"]]
    rows = [TOK.encode(text) for texts in said for text in texts]
    batch = {"pixels": torch.zeros(3, 3, 4, 4), **data.pad_captions(rows, TOK.bos, TOK.eos, TOK.pad)}
    found = data.words_said(batch, TOK, TOK.vocab_size)
    assert found.shape == (3, TOK.vocab_size) and found.dtype == torch.float32
    for b in range(3):
        assert set(found[b].nonzero()[:, 0].tolist()) == set(rows[2 * b] + rows[2 * b + 1])
    assert set(found.unique().tolist()) == {0.0, 1.0}


def test_a_text_of_which_nothing_was_drawn():
    """at_least_one adds one place to such a text and to no other, and draws nothing more; any place can be it."""
    ids = torch.randint(5, 300, (400, 6), generator=luck())
    may_mask = torch.rand(400, 6, generator=luck(1)) < 0.6
    may_mask[0] = False
    (_, plain), (shown, labels) = (data.mask_words(ids, may_mask, 4, 300, 0.15, luck(2), at_least_one=x)
                                   for x in (False, True))  # fmt: skip
    before, after = (plain != -100), (labels != -100)
    none = ~before.any(1)
    assert 50 < none.sum() < 350 and torch.equal(before[~none], after[~none])
    assert after[none & may_mask.any(1)].sum(1).unique().tolist() == [1] and not after[0].any()
    assert not (after & ~may_mask).any() and torch.equal(labels[after], ids[after])
    assert torch.equal(shown[~after], ids[~after]) and len(after[none].nonzero()[:, 1].unique()) == 6
    generators = [luck(5), luck(5)]
    for generator, x in zip(generators, (False, True), strict=True):
        data.mask_words(ids, may_mask, 4, 300, 0.15, generator, at_least_one=x)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
