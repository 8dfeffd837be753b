"""Languages, words and what makes texts alike; Chinese is worked out by hand, sacrebleu's tokenizers are its own."""

import pytest
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_char import TokenizerChar
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh
from written import pairs

from dsft.metrics.scores.language import normalized, tokens, told, words


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("今天天气 ok", "zh"),
        ("用 Python 写", "other"),  # two characters, six letters
        ("天天ok", "other"),
        ("fine", "en"),
        ("schön", "other"),
        ("хорошо", "other"),
        ("きょうは晴れ", "ja"),
        ("東京大学の研究者", "ja"),
        ("我家在北京の胡同里面，每天都去公园散步看花。", "zh"),  # one syllable is a flourish
        ("สวัสดี", "th"),
        ("한국어 텍스트", "other"),  # has spaces
        ("12", "en"),
        ("。！", "en"),
        ("🙂", "en"),
        ("", "en"),
    ],
)
def test_the_language_is_told_by_the_references(text, own):
    assert told("auto", [text]) == own
    assert told("ja", [text]) == "ja"


def test_all_references_tell_the_language():
    assert told("auto", ["ok", "今天天气"]) == "zh" and told("auto", ["fine weather", "今天天气"]) == "other"


@pytest.mark.parametrize(
    ("text", "own", "found"),
    [
        ("ＡＢ12 你好,World", "zh", ["ab12", "你", "好", "world"]),
        ("用GPT４写", "other", ["用", "gpt4", "写"]),
        ("きょう x", "ja", ["き", "ょ", "う", "x"]),
        ("Füße_weh", "de", ["füße", "weh"]),
        ("。！🙂", "zh", []),
        ("हिन्दी में", "hi", ["हिन्दी", "में"]),  # vowel signs belong to their letters
        ("สวัสดี", "th", ["ส", "วั", "ส", "ดี"]),
        ("☀️ ok", "en", ["ok"]),
        ("𠮷野", "zh", ["𠮷", "野"]),  # beyond the basic plane
    ],
)
def test_words(text, own, found):
    assert words(text, own) == found


@pytest.mark.parametrize(("name", "judge"), [("13a", Tokenizer13a()), ("zh", TokenizerZh()), ("char", TokenizerChar())])
def test_tokens_are_sacrebleus(name, judge):
    texts = [said for chinese in (False, True) for said, *_ in pairs(200, chinese, lines=True)]
    for text in [*texts, "&quot;a&quot; 3.5, 1,000 U.S. don't-", "ends-\n", "学习AI，用GPT-4。", "", " 字 ", "🙂🙂"]:
        assert tokens(text, name) == judge(text.rstrip()).split()


def test_tokenizers_keep_no_texts():
    tokens("a text that is asked for once", "13a")
    tokens("一次", "zh")
    assert Tokenizer13a.__call__.cache_info().currsize == TokenizerZh.__call__.cache_info().currsize == 0


def test_words_of_rjieba():
    assert tokens("我来到北京清华大学。 hello world", "words") == [
        "我",
        "来到",
        "北京",
        "清华大学",
        "。",
        "hello",
        "world",
    ]


@pytest.mark.parametrize(
    ("names", "text", "made"),
    [
        ((), "ＡＢＣ，漢", "ＡＢＣ，漢"),
        (("width",), "ＡＢＣ１２，漢ｶﾀ", "ABC12,漢カタ"),
        (("simplified",), "後面的頭髮，皇后", "后面的头发，皇后"),
        (("case",), "ＡBc", "ａbc"),
        (("case", "simplified", "width"), "ＡＢ 漢語", "ab 汉语"),
    ],
)
def test_normalized(names, text, made):
    assert normalized(text, names) == made
