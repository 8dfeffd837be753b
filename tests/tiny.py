"""Tiny models, tokenizers and data, made on the spot: nothing is fetched from anywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dsft.config.schema import Attention, DataConfig, EvalConfig, OnOverflow, TaskConfig, TrainConfig
from dsft.data import dataset
from dsft.data.prompting import load
from dsft.data.sources import Raw
from dsft.metrics import declare
from dsft.model.attention import Documents, cumulative
from dsft.model.noise import Noise, token_keys
from dsft.tasks import TASKS, encode
from dsft.tasks.collate import Collator
from dsft.tasks.conversation import SHAPES
from dsft.tasks.isolation import probe_tokens
from dsft.tasks.labels import Labels
from dsft.tasks.module import TaskModule
from dsft.tasks.task import Context, read, reader
from dsft.types import Batch, Example

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = (
    "the red fox sees a blue bird and the bird sees the fox ; where is the moon ? it is over the hill , says the owl . "
    "春天来了 , 花都开了 。 月亮在哪里 ？ 在山上 。"
).split()


def tokenizer(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template, trained on WORDS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS), "user assistant system"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


TOKENIZER = tokenizer()


def encoder_tokenizer(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts [CLS] and [SEP] around a text and has a mask token, as encoders want it."""
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_input_names=inputs, **names)


ENCODER_TOKENIZER = encoder_tokenizer()


def two_sided_tokenizer(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that ends every text with </s>, as encoder-decoders want it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<unk>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


TWO_SIDED_TOKENIZER = two_sided_tokenizer()

METRICS = declare(TASKS["causal_lm"].metrics, TASKS["causal_lm"].target)
"""What a run of causal language modelling declares."""


def byte_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """A token for each byte, so that every Chinese character is three."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)


def llama_config(**changes) -> LlamaConfig:
    """A Llama with grouped heads and tied embeddings, small enough for a step in milliseconds."""
    settings = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(settings | changes))


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A model with weights large enough that its answers differ."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(initializer_range=0.2, **changes)).float()


def causal(family: str, attention: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A causal language model of any family that transformers knows, in evaluation mode.

    Every weight is moved off its start, so that no bias is 0 and no norm 1.
    """
    shape = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "attn_pdrop": 0.0,
    }
    known = CONFIG_MAPPING[family]()
    settings = {name: value for name, value in shape.items() if hasattr(known, name)} | changes
    config = CONFIG_MAPPING[family](**settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def masked(family: str, attention: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A masked language model of any family that transformers knows, in evaluation mode, as in `causal`."""
    shape = {"vocab_size": 400, "hidden_size": 32, "embedding_size": 32, "intermediate_size": 48}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
    shape |= {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    known = CONFIG_MAPPING[family]()
    settings = {name: value for name, value in shape.items() if hasattr(known, name)} | changes
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**settings)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def two_sided(family: str, attention: str = "eager", seed: int = 0, **changes) -> PreTrainedModel:
    """An encoder-decoder of any family that transformers knows, in evaluation mode, as in `causal`."""
    shape = {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    shape |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    shape |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128, "init_std": 0.2}
    shape |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    known = CONFIG_MAPPING[family]()
    settings = {name: value for name, value in shape.items() if hasattr(known, name)} | changes
    settings.setdefault("decoder_start_token_id", 0)
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**settings)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def written_rows(count: int, seed: int = 0) -> list[dict]:
    """Texts with another to be written from each, of other lengths; some with weights."""
    random = np.random.default_rng(seed)
    rows: list[dict] = []
    for number, (source, target) in enumerate(zip(texts(count, seed), texts(count, seed + 1, longest=14))):
        rows.append({"source": source, "target": target})
        if number % 4 == 0:
            rows[-1]["weight"] = float(random.choice([0.3, 2.0]))
    return rows


def written_examples(count: int, seed: int = 0, tokens=None, **settings) -> list[Example]:
    """What an encoder-decoder's task makes of `written_rows`."""
    data = DataConfig(max_length=48, max_target_length=16)
    context = replace(collator("seq2seq", tokens=tokens, **settings).context, data=data)
    rows = [Raw(row, f"row {number}") for number, row in enumerate(written_rows(count, seed))]
    return [example for row in rows for example in encode(row, TASKS["seq2seq"], context)]


def texts(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Random words, in English and Chinese."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, int(random.integers(1, longest)))) for _ in range(count)]


def masked_examples(count: int, seed: int = 0, **settings) -> list[Example]:
    """What masked language modelling makes of texts, of at most 48 tokens each."""
    context = replace(collator("masked_lm", **settings).context, data=DataConfig(max_length=48))
    rows = [Raw({"text": text}, f"text:{number}") for number, text in enumerate(texts(count, seed))]
    return [example for row in rows for example in encode(row, TASKS["masked_lm"], context)]


FORGETFUL = (  # leaves out the reasoning of all turns but the last
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def weighed_rows(count: int, seed: int = 0) -> list[dict]:
    """Chats with reasoning, and plain texts; records and messages carry weights, whole and fractions."""
    random = np.random.default_rng(seed)
    rows: list[dict] = []
    for number, text in enumerate(texts(count, seed, longest=60)):
        weight = {} if number % 3 else {"weight": float(random.choice([0.3, 1, 2.5]))}
        if number % 4 == 0:
            rows.append({"text": text, **weight})
            continue
        rows.append({"messages": [], **weight})
        for _ in range(int(random.integers(1, 4))):
            question, answer, thought = (" ".join(random.choice(WORDS, int(random.integers(1, 7)))) for _ in range(3))
            counts = random.choice([None, 0, 0.5, 1, 1.7])
            carried = {} if counts is None else {"weight": float(counts)}
            said = f"<think>{thought}</think>{answer}" if random.random() < 0.5 else answer
            rows[-1]["messages"] += [{"role": "user", "content": question}]
            rows[-1]["messages"] += [{"role": "assistant", "content": said, **carried}]
    return rows


def weighed_examples(count: int, seed: int = 0) -> list[Example]:
    """The first `count` examples of `weighed_rows`: documents split at 48 tokens, histories as they were written."""
    tokens = tokenizer()
    tokens.chat_template = FORGETFUL
    context = Context(tokens, DataConfig(max_length=48, on_overflow=OnOverflow.split), TaskConfig(name="causal_lm"))
    made: list[Example] = []
    for row in weighed_rows(count, seed):
        parts = encode(Raw(row, "weighed"), TASKS["causal_lm"], context)
        made += [part for part in parts if isinstance(part, Example)] if isinstance(parts, list) else []
    return made[:count]


def collator(name: str = "causal_lm", padded: bool = False, tokens=None, seed: int = 0, **settings) -> Collator:
    """What makes batches of a task; `settings` are those of its own section."""
    kind = TASKS[name].kind
    usual = TWO_SIDED_TOKENIZER if kind.two_sided else TOKENIZER if kind.encoder is False else ENCODER_TOKENIZER
    context = Context(tokens or usual, DataConfig(), TaskConfig(**settings), EvalConfig(), TrainConfig(seed=seed))
    if TASKS[name].kind.headed:
        numbers = Labels(("a", "b"), scale=(17.0, 0.008), shift=(120.0, -0.01))
        named = {"regress": numbers, "tag": Labels(TAGS), "extract": Labels(ENDS)}.get(
            name, Labels(LABELS, LABEL_WEIGHTS)
        )
        context = replace(context, labels=named)
    return Collator(TASKS[name], context, padded)


LABELS, LABEL_WEIGHTS = ("red", "blue", "狐狸"), (0.5, 1.0, 2.25)
"""Labels of the tests, and what a record of each counts in training."""

CLASSIFYING = {"focal_gamma": 1.5, "label_smoothing": 0.1}
"""Settings of a classification whose loss is none of the plain ones."""


def labelled_rows(count: int, seed: int = 0, several: bool = False) -> list[dict]:
    """Texts and pairs with labels that a word in them tells, some with weights; of `several` labels any number."""
    random = np.random.default_rng(seed)
    rows: list[dict] = []
    for number, (first, second) in enumerate(zip(texts(count, seed), texts(count, seed + 1))):
        chosen = [label for label in LABELS if random.random() < 0.5]
        one = LABELS[int(random.integers(len(LABELS)))]
        words = " ".join(chosen) if several else one
        rows.append({"text": f"{words} {first}", "label": chosen if several else one})
        if number % 3 == 0:
            rows[-1]["text_pair"] = second
        if number % 4 == 0:
            rows[-1]["weight"] = float(random.choice([0.3, 2.0]))
    return rows


def labelled_examples(count: int, seed: int = 0, tokens=None, **settings) -> list[Example]:
    """What classification makes of `labelled_rows`."""
    context = replace(collator("classify", tokens=tokens, **settings).context, data=DataConfig(max_length=48))
    rows = labelled_rows(count, seed, several=context.task.multi_label)
    made = [encode(Raw(row, f"row {number}"), TASKS["classify"], context) for number, row in enumerate(rows)]
    return [example for examples in made for example in examples]


def tagged_rows(count: int, seed: int = 0, longest: int = 30) -> list[dict]:
    """Words in English and Chinese with tags of entities that they tell, some with weights."""
    random = np.random.default_rng(seed)
    rows: list[dict] = []
    for number, text in enumerate(texts(count, seed, longest)):
        words, tags = text.split(), list[str]()
        for word in words:
            kind = {"fox": "ANIMAL", "bird": "ANIMAL", "owl": "ANIMAL", "moon": "天体", "hill": "天体"}.get(word)
            after = tags and tags[-1].endswith(str(kind)) and random.random() < 0.7
            tags.append(f"{'I' if after else 'B'}-{kind}" if kind else "O")
        rows.append({"tokens": words, "tags": tags})
        if number % 4 == 0:
            rows[-1]["weight"] = float(random.choice([0.3, 2.0]))
    return rows


TAGS = ("B-ANIMAL", "B-天体", "I-ANIMAL", "I-天体", "O")
"""Tags of `tagged_rows`."""


def tagged_examples(count: int, seed: int = 0, tokens=None, **settings) -> list[Example]:
    """What tagging makes of `tagged_rows`, of which some take several windows of 24 tokens."""
    made = collator("tag", tokens=tokens, overlap=6, **settings)
    return windowed(made, tagged_rows(count, seed), max_length=24)[:count]


def windowed(made: Collator, rows: list[dict], max_length: int) -> list[Example]:
    """What a task makes of rows, some of them in several windows."""
    context = replace(made.context, data=DataConfig(max_length=max_length))
    examples: list[Example] = []
    for number, row in enumerate(rows):
        parts = encode(Raw(row, f"row {number}"), made.task, context)
        examples += [replace(part, record=number) for part in parts if isinstance(part, Example)]
    return examples


ENDS = ("start", "end")
"""Outputs of a model that extracts answers."""


def asked_rows(count: int, seed: int = 0, longest: int = 30) -> list[dict]:
    """Questions about texts in English and Chinese, one in four without an answer, some with weights."""
    random = np.random.default_rng(seed)
    rows: list[dict] = []
    for number, text in enumerate(texts(count, seed, longest)):
        words = text.split()
        begin = int(random.integers(len(words)))
        answer = " ".join(words[begin : begin + int(random.integers(1, 4))])
        start = len(" ".join([*words[:begin], ""]))
        answers = [] if number % 4 == 3 else [{"text": answer, "answer_start": start}]
        if number % 5 == 1 and answers:
            answers.append({"text": words[0], "answer_start": 0})
        rows.append({"question": f"where is {words[begin]} ?", "context": text, "answers": answers})
        if number % 3 == 0:
            rows[-1]["weight"] = float(random.choice([0.3, 2.0]))
    return rows


def asked_examples(count: int, seed: int = 0, tokens=None, **settings) -> list[Example]:
    """What the extraction of answers makes of `asked_rows`, of which some take several windows of 32 tokens."""
    made = collator("extract", tokens=tokens, overlap=8, **settings)
    return windowed(made, asked_rows(count, seed), max_length=32)[:count]


def rated_rows(count: int, seed: int = 0) -> list[dict]:
    """Texts and pairs with two numbers of other sizes that their words tell, some with weights."""
    rows = labelled_rows(count, seed)
    for row in rows:
        label = LABELS.index(row.pop("label"))
        row["labels"] = [100.0 + 20 * label + len(row["text"]) / 7, -0.01 * label]
    return rows


def rated_examples(count: int, seed: int = 0, tokens=None, **settings) -> list[Example]:
    """What regression makes of `rated_rows`."""
    context = replace(collator("regress", tokens=tokens, **settings).context, data=DataConfig(max_length=48))
    rows = [Raw(row, f"row {number}") for number, row in enumerate(rated_rows(count, seed))]
    return [example for row in rows for example in encode(row, TASKS["regress"], context)]


def labels_of(example: Example) -> list[int]:
    """Numbers of an example's labels."""
    return [LABELS.index(name) for name in example.labels]


def classifier(family: str, attention: str = "eager", seed: int = 0, names=LABELS, **changes) -> PreTrainedModel:
    """A model of any family with a head for LABELS or others, in evaluation mode, as in `causal`."""
    body = masked if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES else causal
    config = body(family, attention, seed, **changes).config
    config.id2label, config.label2id = dict(enumerate(names)), {name: n for n, name in enumerate(names)}
    torch.manual_seed(seed)
    autos = {TAGS: AutoModelForTokenClassification, ENDS: AutoModelForQuestionAnswering}
    auto = autos.get(names, AutoModelForSequenceClassification)
    model = auto.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def prepare(data: DataConfig, tokens, fingerprint: str = "t", seed: int = 0, name: str = "causal_lm", **settings):
    """Training set, validation set and audit of a task, as a run prepares them."""
    context = Context(tokens, data, TaskConfig(name=name, **settings), train=TrainConfig(seed=seed))
    prompting = load(data, seed, reader(TASKS[name], data))
    context = replace(context, prompting=prompting)
    recipe = {
        "prompting": prompting.recipe(),
        "tokenizer": fingerprint,
        "template": tokens.chat_template,
        "length": data.max_length,
    }
    recipe |= {"train_on": data.train_on.name, "overflow": data.on_overflow.name, "task": repr(context.task)}
    made = dataset.prepare(data, partial(encode, task=TASKS[name], context=context), recipe, seed)
    return made.train, made.validation, made.audit


def conversation(fields: dict, origin: str = ""):
    """The conversation that a row's fields hold."""
    return read(SHAPES, fields, origin)


def collate(examples: list[Example], step: tuple[int, int] = (0, 0), **options):
    """A batch of causal language modelling."""
    return collator(**options).train(examples, step)


def task(
    model: PreTrainedModel,
    chunk: int = 5,
    *,
    name: str = "causal_lm",
    kernel: Attention = Attention.per_document,
    seed: int = 0,
    alpha: float = 0.0,
    padded: bool = False,
    **settings,
) -> TaskModule:
    """A model with the loss of its task, as a run makes it; `settings` are those of its own section."""
    noise = Noise(model, seed, alpha)
    vocabulary = model.config.get_text_config().vocab_size
    probe = probe_tokens(examples(3, vocabulary=vocabulary))
    loss = partial(TASKS[name].loss, settings=TaskConfig(name=name, **settings))
    return TaskModule(model, loss, kernel, chunk, noise, probe, padded, by_document=TASKS[name].kind.by_document)


def documents(lengths: list[int], device="cpu", kernel: Attention = Attention.per_document, noise=None) -> Documents:
    """The documents of a flat row, as a batch says where they are."""
    return Documents(lengths, cumulative(lengths).to(device), kernel, noise)


def begin(
    noise: Noise,
    step,
    lengths: list[int],
    numbers: list[int],
    width: int | None = None,
    device="cpu",
    written: int | None = None,
) -> None:
    """Let a Noise draw for documents of these lengths and numbers; padded to a width, if one is given, and with another
    side as wide as is `written`."""
    keys = token_keys(noise._seed, step, lengths, numbers, width and max(width, written or 0))
    tensors = {"noise": keys, "lengths": torch.tensor(lengths)}
    if width and written:
        tensors |= {"input_ids": torch.zeros(1, width), "decoder_labels": torch.zeros(1, written)}
    noise.begin(Batch(tensors, lengths, 0.0, len(lengths), numbers, step, width is not None).to(torch.device(device)))


def save(directory: Path, **changes) -> Path:
    """A model directory with weights, tokenizer and chat template."""
    llama(**changes).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def records(count: int, seed: int = 0) -> list[dict]:
    """Chats of one to three turns of random words, so that masks are uneven."""
    random = np.random.default_rng(seed)

    def say(low, high):
        return " ".join(random.choice(WORDS, int(random.integers(low, high))))

    return [
        {
            "messages": [
                message
                for _ in range(int(random.integers(1, 4)))
                for message in (
                    {"role": "user", "content": say(1, 8)},
                    {"role": "assistant", "content": say(1, 14)},
                )
            ]
        }
        for _ in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Rows as a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def example(ids: np.ndarray, supervised: np.ndarray, **more) -> Example:
    """An example of these ids, whose weight is its supervised tokens."""
    return Example({"ids": ids, "weights": supervised.astype(np.float32)}, len(ids), float(supervised.sum()), **more)


def examples(count: int, seed: int = 0, shortest: int = 4, longest: int = 40, vocabulary: int = 400) -> list[Example]:
    """Random token ids with uneven supervision; every example has at least one target."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = random.integers(3, vocabulary, int(random.integers(shortest, longest + 1))).astype(np.int32)
        supervised = random.random(len(ids)) < random.uniform(0.05, 0.9)
        supervised[0], supervised[-1] = False, True
        made.append(example(ids, supervised))
    return made
