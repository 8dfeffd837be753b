"""New tokens of a tokenizer: what a file may hold, what is added, and the pieces that they were before."""

import copy
import json

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsft.errors import UserError
from dsft.model import load, vocabulary


def written(tmp_path, content: str | bytes) -> str:
    file = tmp_path / "新词.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(file)


def words(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_token_per_line_without_blank_lines_carriage_returns_or_a_byte_order_mark(tmp_path):
    file = written(tmp_path, "\ufeff月亮\r\n\r\nNew York\n  \n<|tool|>\n月亮")
    assert vocabulary.read(file) == ["月亮", "New York", "<|tool|>", "月亮"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("好\n 月亮\n", r"line 2: ' 月亮' begins or ends with a space"),
        ("月亮\u3000\n", "begins or ends with a space"),
        ("月亮\t1234\n", "line 1.*control character"),
        ("\n \n", "holds no token"),
        ("", "holds no token"),
        ("月亮".encode("gb18030"), "not UTF-8"),
        ("月亮".encode("utf-16"), "not UTF-8"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer.*git lfs pull"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"^data\.new_tokens=.*新词\.txt: .*{message}"):
        vocabulary.read(written(tmp_path, content))


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            vocabulary.read(str(path))


def test_added_tokens_are_matched_whole_and_know_their_pieces(tmp_path):
    """With a token per byte a Chinese character is three pieces; ids follow the file's order."""
    tokenizer = tiny.byte_tokenizer()
    before = copy.deepcopy(tokenizer)
    texts = ["月亮", "月", "🌙 moon", "<|tool|>"]
    made = vocabulary.extend(tokenizer, texts, rows=len(before))
    assert made.first == len(before) and made.size == len(tokenizer) == made.first + 4
    assert made.added == made.texts == tuple(texts)
    assert made.pieces == tuple(tuple(words(before, text)) for text in texts)
    assert [len(pieces) for pieces in made.pieces] == [6, 3, 9, 8]
    first = made.first
    assert words(tokenizer, "在月亮上a月b🌙 moons<|tool|>") == [
        *words(before, "在"),
        first,
        *words(before, "上a"),
        first + 1,
        *words(before, "b"),
        first + 2,
        *words(before, "s"),
        first + 3,
    ]
    assert tokenizer.decode(words(tokenizer, "a月亮<|tool|>"), skip_special_tokens=True) == "a月亮"


def test_new_tokens_change_the_fingerprint_and_survive_saving(tmp_path):
    tokenizer = tiny.tokenizer()
    before = load.tokenizer_fingerprint(tokenizer)
    vocabulary.extend(tokenizer, ["月亮", "<|tool|>"], rows=400)
    assert load.tokenizer_fingerprint(tokenizer) != before
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "the 月亮<|tool|> moon"
    assert words(again, text) == words(tokenizer, text) and len(again) == len(tokenizer)
    assert load.tokenizer_fingerprint(again) == load.tokenizer_fingerprint(tokenizer)


def test_known_and_repeated_tokens_are_left_out_and_told():
    """`a` is an entry by its name, `月` by the name that its bytes have: both are tokens already."""
    state = json.loads(tiny.byte_tokenizer().backend_tokenizer.to_str())
    state["model"]["merges"] = [["æ", "ľ"], ["æľ", "Ī"]]
    state["model"]["vocab"] |= {"æľ": 256, "æľĪ": 257}
    for place, token in enumerate(state["added_tokens"], start=258):
        token["id"] = place
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert len(tokenizer) == 260 and words(tokenizer, "月") == [257]
    made = vocabulary.extend(tokenizer, ["a", "狐狸", "月", "<|im_end|>", "狐狸", "a"], rows=260)
    assert made.added == ("狐狸",) and made.known == ("a", "月", "<|im_end|>")
    assert made.repeated == ("a", "狐狸") and len(tokenizer) == 261
    audit = made.audit(np.array([3, made.first]))
    assert audit == {"added": ["狐狸"], "known": ["a", "月", "<|im_end|>"], "repeated": ["a", "狐狸"], "unseen": []}
    assert [note.partition(": ")[2] for note in made.notes(audit, trained=True)] == [
        "1 added to the tokenizer: '狐狸'",
        "3 left out, being tokens already: 'a', '月', '<|im_end|>'",
        "2 given more than once: 'a', '狐狸'",
    ]


def test_tokens_that_stay_untrained_or_unseen_are_told():
    made = vocabulary.extend(tiny.tokenizer(), ["狐狸", "鸟儿"], rows=400)
    unseen, untrained = list(made.notes(made.audit(np.array([3, made.first + 1])), trained=False))[1:]
    assert unseen == "new tokens: 1 of 2 new tokens occur nowhere in the data: '狐狸'"
    assert untrained.startswith("new tokens: all 2 keep the mean of their pieces, since tuning.new_tokens=false")


def test_known_tokens_alone_add_nothing():
    made = vocabulary.extend(tokenizer := tiny.tokenizer(), ["the", "<|im_start|>"], rows=400)
    assert made == vocabulary.Vocabulary(len(tokenizer), known=("the", "<|im_start|>")) and len(tokenizer) == 370


def test_a_name_that_the_vocabulary_uses_for_other_text_is_refused():
    """A byte-level vocabulary writes the byte E9 as é; the text é is two other bytes."""
    with pytest.raises(UserError, match=r"data\.new_tokens: 'é' cannot be added"):
        vocabulary.extend(tiny.byte_tokenizer(), ["é"], rows=400)


def test_a_token_that_normalising_would_change_keeps_its_own_text():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "moon": 1}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    made = vocabulary.extend(tokenizer, ["Moon"], rows=2)
    assert made.pieces == ((1,),) and words(tokenizer, "Moon") == [2] and words(tokenizer, "moon") == [1]


def test_a_token_of_nothing_is_refused():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "moon": 1}, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace("\u00ad", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(UserError, match="nothing at all under the old vocabulary"):
        vocabulary.extend(tokenizer, ["\u00ad"], rows=2)


def test_tokens_that_came_with_the_tokenizer_but_without_a_row_are_new():
    """As after `add_tokens` and `save_pretrained` without resizing; more can be added to them."""
    tokenizer = tiny.byte_tokenizer()
    before = copy.deepcopy(tokenizer)
    rows = len(before)
    tokenizer.add_tokens(["月亮"])
    alone = vocabulary.extend(tokenizer, [], rows)
    assert (alone.first, alone.texts, alone.added) == (rows, ("月亮",), ())
    both = vocabulary.extend(tokenizer, ["狐狸"], rows)
    assert both.texts == ("月亮", "狐狸") and both.added == ("狐狸",)
    assert both.pieces == tuple(tuple(words(before, text)) for text in both.texts)


def test_rows_to_spare_leave_a_tokenizer_alone():
    tokenizer = tiny.tokenizer()
    made = vocabulary.extend(tokenizer, [], rows=400)
    assert made == vocabulary.Vocabulary(len(tokenizer))
    assert list(made.notes(made.audit(np.array([1])), trained=False)) == []


def test_a_vocabulary_that_has_outgrown_its_model_is_taken_apart_by_its_own_merges():
    """As of a tokenizer that was trained on: entries beyond the model's rows become pieces of the earlier ones."""
    tokenizer, rows = tiny.tokenizer(), 300
    made = vocabulary.extend(tokenizer, ["狐狸"], rows)
    assert (made.first, made.size) == (300, 371) and made.added == ("狐狸",)
    names = tokenizer.convert_ids_to_tokens(list(range(300)))
    for text, pieces in zip(made.texts[:-1], made.pieces[:-1], strict=True):
        assert len(pieces) > 1 and "".join(names[piece] for piece in pieces) == text
    assert all(piece < 300 for pieces in made.pieces for piece in pieces)


def test_a_unigram_vocabulary_is_taken_apart_too():
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("月", -1.0), ("亮", -1.0), ("月亮", -1.0)], 0, False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    made = vocabulary.extend(tokenizer, [], rows=3)
    assert made.texts == ("月亮",) and made.pieces == ((1, 2),)


def test_the_identity_is_that_of_the_tokens_and_their_order():
    made = {vocabulary.extend(tiny.tokenizer(), texts, 400).identity for texts in (["狐", "狸"], ["狸", "狐"], ["狐"])}
    assert len(made) == 3 and vocabulary.Vocabulary(3).identity == "none"
