"""What models read and write: captions as they are cleaned, answers as VQA compares them, tokenizers. Knows no model.

Reading map: texts | tokenizers | words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from common import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Texts


def clean_caption(text: str) -> str:
    """What models read and write: lower case, single blanks, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(" .")


_PUNCTUATION = set(";/[]\"{}()=+\\_-><@`,?!")
_NUMBER_WORDS = "none zero one two three four five six seven eight nine ten".split()
_NUMBER_WORDS = {word: str(max(0, i - 1)) for i, word in enumerate(_NUMBER_WORDS)}
# OFFICIAL: 120 misspellings, which are the right forms less any one of their apostrophes, and three of another kind.
# Those with capitals never match, being looked up in lower case.
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've
mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
_CONTRACTIONS = {right[:i] + right[i + 1 :]: right for right in _CONTRACTIONS for i, c in enumerate(right) if c == "'"}
_CONTRACTIONS |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


def normalise_answer(text: str) -> str:
    """An answer as VQA's official evaluation compares it: without punctuation, full stops, capitals and articles, with
    digits for number words and apostrophes in contractions. What consists of articles alone becomes the empty text."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain, has_thousands = text, re.search(r"\d,\d", text)
    for mark in _PUNCTUATION & set(text):
        is_loose = f" {mark}" in text or f"{mark} " in text  # beside a blank in the text as it was given
        plain = plain.replace(mark, "" if is_loose or has_thousands else " ")
    plain = re.sub(r"\.(?!\d)", "", plain, count=32)  # OFFICIAL: 32, a flag that stands where the count belongs
    words = [_NUMBER_WORDS.get(word, word) for word in plain.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)  # leftmost, right-hand too


def swap_sides(text: str) -> str:
    """What is said of a picture, as it is true of its mirror image: left for right and right for left."""

    def other(found: re.Match) -> str:
        side = "right" if found[0].lower() == "left" else "left"
        return side if found[0].islower() else side.upper() if found[0].isupper() else side.capitalize()

    return SIDES.sub(other, text)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


class Tokenizer:
    """A `tokenizers.Tokenizer` with the three ids that batches need, and BERT's [MASK] or RoBERTa's <mask>.

    GPT-2 has one special token for all three, and nothing to hide words behind: mask is None.
    """

    def __init__(self, backend, bos: int, eos: int, pad: int, mask: int | None = None):
        self.backend, self.bos, self.eos, self.pad, self.mask = backend, bos, eos, pad, mask
        backend.no_truncation()  # files from the hub may ask for either; lengths are ours to decide
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|endoftext|>" or "[SEP]" inside a caption is text, not a command

    def __reduce__(self):  # the backend's own pickle forgets encode_special_tokens
        return _tokenizer_from_text, (self.backend.to_str(), self.bos, self.eos, self.pad, self.mask)

    @property
    def vocab_size(self) -> int:
        """Rows of an embedding table: the special tokens are counted."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, max_len: int | None = None) -> list[int]:
        """Ids of the text without special tokens, cut to the first `max_len`. The text is taken as it is."""
        return self.backend.encode(text, add_special_tokens=False).ids[:max_len]

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first eos, without special tokens. With GPT-2, where bos = eos, pass what follows bos."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return self.backend.decode([i for i in ids if i not in (self.bos, self.pad)], skip_special_tokens=True).strip()

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json, which other libraries read too, and tokenizer_meta.json with the ids."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.backend.save(str(Path(folder, "tokenizer.json")))
        ids = {name: getattr(self, name) for name in ("bos", "eos", "pad", "mask")}
        Path(folder, "tokenizer_meta.json").write_text(json.dumps(ids))

    @staticmethod
    def load(folder: Path | str) -> Tokenizer:
        """Reads what `save` wrote; older runs name no mask."""
        files = [Path(folder, name) for name in ("tokenizer.json", "tokenizer_meta.json")]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing: pass a folder that a run of this project wrote")
        try:
            return _tokenizer_from_text(files[0].read_text("utf-8"), **json.loads(files[1].read_text()))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"{files[0]} cannot be read ({error}): is the run whole? Take another one") from None

    @staticmethod
    def from_pretrained(name_or_dir: str | Path) -> Tokenizer:
        """Of a hub id, or of a directory: one of ours, one that transformers reads, or GPT-2's or RoBERTa's
        vocab.json + merges.txt or BERT's vocab.txt (lower-case) alone.

        bos, eos, pad, mask are the model's own; BERT's [CLS], [SEP], [PAD], [MASK]; RoBERTa's <s>, </s>, <pad>, <mask>.
        In place of one of the first three that is lacking stands eos.
        """
        folder = Path(name_or_dir)
        if (folder / "tokenizer_meta.json").is_file():
            return Tokenizer.load(folder)
        present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if {"vocab.json", "merges.txt"} <= present and not present & {"tokenizer.json", "config.json"}:
            from tokenizers import models

            vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
            backend = _byte_level(models.BPE.from_file(vocab, merges))
            for special in (ROBERTA_TOKENS, (END,)):  # RoBERTa's has GPT-2's token, too, as a piece that is never used
                if all(backend.token_to_id(token) is not None for token in special):
                    return _with_special(backend, special)
            raise UserError(f"{vocab} has neither {END} nor {', '.join(ROBERTA_TOKENS)}, so it is not GPT-2's and not "
                            "RoBERTa's; put the model's config.json beside it")  # fmt: skip
        if "vocab.txt" in present and not present & {"tokenizer.json", "config.json", "tokenizer_config.json"}:
            return _like_bert(_read_vocabulary(folder / "vocab.txt"))
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(str(name_or_dir))
            backend = found.backend_tokenizer.to_str()
        except Exception as error:  # no network, no such id, or a folder without a tokenizer: each its own class
            kind = "the folder" if folder.is_dir() else "the hub (there is no such folder here)"
            raise UserError(
                f"could not load the tokenizer {str(name_or_dir)!r} from {kind}: {' '.join(str(error).split())[:300]}\n"
                "Pass a directory that holds tokenizer.json, or vocab.json and merges.txt, or vocab.txt, or pass "
                "`none` to train without official files."
            ) from error
        eos = _first(found.eos_token_id, found.sep_token_id)
        bos, pad = _first(found.bos_token_id, found.cls_token_id, eos), _first(found.pad_token_id, eos)
        known = found.get_vocab()
        for names in (("<s>", "</s>", "<pad>"), (END, END, END), ("[CLS]", "[SEP]", "[PAD]")):
            if eos is None and known.keys() >= set(names):  # tokenizer.json alone does not say what they are for
                bos, eos, pad = (known[name] for name in names)
        mask = _first(found.mask_token_id, known.get("[MASK]"), known.get("<mask>"))
        if eos is None:
            raise UserError(f"the tokenizer {name_or_dir} names no end token; set eos_token in tokenizer_config.json")
        found = _tokenizer_from_text(backend, bos, eos, pad, mask)
        if json.loads(backend)["model"]["type"] == "WordPiece":
            found.backend.decoder = _word_pieces().decoder  # BERT's own leaves blanks: isn ' t
        return found

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, kind: str = "bpe") -> Tokenizer:
        """bpe: byte-level like GPT-2's; every text can be written, so nothing is unknown. roberta: the same with
        RoBERTa's special tokens, <s> 0, <pad> 1, </s> 2, <unk> 3, which no text needs, and <mask> 4 (RoBERTa's own is
        its last). wordpiece: like BERT's, lower-case, without accents, punctuation apart; a word with a character that
        was in no text is [UNK].

        The same texts give the same tokenizer. `vocab_size` is an upper bound; the least are 257, bytes and end token,
        261, bytes and RoBERTa's five, or the characters and BERT's five; UserError below. Texts are taken as they are:
        clean them first if cleaned captions are what will be encoded.
        """
        if kind == "wordpiece":
            return _train_wordpiece(list(texts), vocab_size)
        if kind not in ("bpe", "roberta"):
            raise UserError(f"tokenizer kind {kind!r} is not known; it is 'bpe', 'roberta' or 'wordpiece'")
        return _train_byte_level(texts, vocab_size, ROBERTA_TOKENS if kind == "roberta" else (END,))


END = "<|endoftext|>"  # GPT-2's only special token: bos, eos and pad
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # bos, pad, eos, unknown, mask


def _tokenizer_from_text(text: str, bos: int, eos: int, pad: int, mask: int | None = None) -> Tokenizer:
    import tokenizers

    return Tokenizer(tokenizers.Tokenizer.from_str(text), bos, eos, pad, mask)


def _byte_level(model):
    """GPT-2's pipeline around a BPE model; no blank is put before the first word."""
    import tokenizers

    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _with_special(backend, special: tuple[str, ...]) -> Tokenizer:
    """GPT-2's or RoBERTa's, which differ in their special tokens alone: (END,) or ROBERTA_TOKENS."""
    backend.add_special_tokens(list(special))  # each keeps its id
    if special == (END,):
        end = backend.token_to_id(END)
        return Tokenizer(backend, bos=end, eos=end, pad=end)
    bos, pad, eos, _, mask = map(backend.token_to_id, special)
    return Tokenizer(backend, bos, eos, pad, mask)


def _train_byte_level(texts: Iterable[str], vocab_size: int, special: tuple[str, ...]) -> Tokenizer:
    from tokenizers import models, pre_tokenizers, trainers

    least = 256 + len(special)
    if vocab_size < least:
        raise UserError(f"a vocabulary of {vocab_size} is too small: 256 bytes and {', '.join(special)} need {least}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,  # a pair seen once teaches nothing about the next caption
        show_progress=False,
    )
    backend = _byte_level(models.BPE())
    backend.train_from_iterator(texts, trainer)
    return _with_special(backend, special)


BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _word_pieces(vocabulary: dict[str, int] | None = None):
    """BERT's pipeline around a vocabulary: lower case, no accents, punctuation apart, "##" inside of words."""
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary or {}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Where blanks stood beside punctuation is lost. As captions have it: a dog, isn't it; t-shirt; 3.5; at 10:30
    tidy = (r" (?=[.,?!;:])", ""), (r"(?<=\w) ' (?=(s|t|m|d|re|ve|ll)\b)", "'"), (r"(?<=\w) - (?=\w)", "-"), \
           (r"(?<=\d[.:]) (?=\d)", "")  # fmt: skip
    backend.decoder = decoders.Sequence([
        decoders.WordPiece(cleanup=False), decoders.Fuse(),
        *(decoders.Replace(tokenizers.Regex(pattern), text) for pattern, text in tidy),
    ])  # fmt: skip
    return backend


def _like_bert(vocabulary: dict[str, int]) -> Tokenizer:
    backend = _word_pieces(vocabulary)
    backend.add_special_tokens(list(BERT_TOKENS))  # each keeps its id
    pad, _, bos, eos, mask = map(backend.token_to_id, BERT_TOKENS)
    return Tokenizer(backend, bos, eos, pad, mask)


def _read_vocabulary(file: Path) -> dict[str, int]:
    """BERT's vocab.txt: a token a line, its id is the number of the line, from 0 on."""
    try:
        lines = file.read_text("utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); fetch it again") from None
    vocabulary = {line: number for number, line in enumerate(lines)}
    missing = [token for token in BERT_TOKENS if token not in vocabulary]
    if missing or len(vocabulary) < len(lines):
        wrong = f"no {', '.join(missing)}" if missing else "a line twice"
        raise UserError(f"{file} has {wrong}, so it is not BERT's; pass the folder of bert-base-uncased")
    return vocabulary


def _train_wordpiece(texts: list[str], vocab_size: int) -> Tokenizer:
    """WordPieceTrainer numbers pieces like ##a in the order of a hash table and breaks ties between pairs by these
    numbers: no two runs would agree. So the single characters are numbered here and given to it as special tokens."""
    from tokenizers import trainers

    backend = _word_pieces()
    split = backend.pre_tokenizer.pre_tokenize_str
    words = {word for text in texts for word, _ in split(backend.normalizer.normalize_str(text))}
    inside = {char for word in words if len(word) > 1 for char in word}
    pieces = [*BERT_TOKENS, *sorted({char for word in words for char in word}), *sorted(f"##{c}" for c in inside)]
    if vocab_size < len(pieces):
        raise UserError(f"a vocabulary of {vocab_size} is too small: the characters of these texts, each at the start "
                        f"and inside of words, and {len(BERT_TOKENS)} special tokens need {len(pieces)}")  # fmt: skip
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=pieces,
        limit_alphabet=len(pieces),  # all of them; by default the 1,000 most frequent
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _like_bert(json.loads(backend.to_str())["model"]["vocab"])


def _first(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)


# ---------------------------------------------------------------------------------------------------------------------
# Words: which tokens of a byte-level BPE are whole words, and which of them mean little

SPACE = "Ġ"  # how byte-level BPE writes the blank before a word
# Words that can change without making a caption false, those that frame it too ("the picture shows"). Prepositions of
# place are not among them: "under" is not "on".
STOP_WORDS = frozenset("""a an the this that these those some any there here it its he she they them his her their him
we our us you your i my me is are was were be been being am has have had do does did will would can could may might
shall should must and or but nor so yet if then than as of to for from by with at into onto while when where which who
whom whose what how not also just very too each other another one's it's 's both together exactly picture image photo
photograph show shows showing shown see sees seen""".split())


def word_tables(tok: Tokenizer, vocab_size: int) -> dict:
    """What is known of each token of a byte-level BPE, [V] each:

    first, later: bool, a whole word where the text begins, and further on; starts: bool, no piece of the word before
    it; stop: bool, a stop word; stem: int64, equal for words that differ in case or in a plural, -ing or -ed alone.
    """
    known = {i: token for token, i in tok.backend.get_vocab().items() if i < vocab_size}
    later = {i: token[1:] for i, token in known.items() if is_word(token[1:]) and token[0] == SPACE}
    whole = set(later.values())
    first = {i: token for i, token in known.items() if is_word(token) and token in whole}
    if not later:
        raise UserError("no token of this tokenizer begins a word as those of byte-level BPE do: take RoBERTa's or "
                        "GPT-2's kind")  # fmt: skip
    starts = [i for i, token in known.items() if token[0] == SPACE] + [tok.eos, tok.pad]
    import torch  # nothing else here needs it

    words, stems = {**later, **first}, {}
    tables = {name: torch.zeros(vocab_size, dtype=torch.bool) for name in ("first", "later", "starts", "stop")}
    for name, which in (("first", first), ("later", later), ("starts", starts)):
        tables[name][list(which)] = True
    tables["stop"][[i for i, word in words.items() if word.lower() in STOP_WORDS]] = True
    numbers = [-1 - i if i not in words else stems.setdefault(stem(words[i]), len(stems)) for i in range(vocab_size)]
    return tables | {"stem": torch.tensor(numbers)}


def is_word(text: str) -> bool:
    return text.isascii() and text.isalpha()


def stem(word: str) -> str:
    """"box" for "boxes", "Box" and "boxing", "run" for "running": not for reading, for comparing."""
    word = word.lower()
    ending = next((e for e in ("ing", "ed", "s") if word.endswith(e) and len(word) - len(e) >= 3), "")
    word = word.removesuffix(ending)
    word = word.removesuffix("e") if len(word) > 3 else word
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word
