"""The notebook that makes the embedded pair, run on next to nothing."""

from pathlib import Path

import papermill
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt.checkpoints import verify
from ruadapt.files import project_root, read_json


def test_the_pair_can_be_made_again(tmp_path: Path) -> None:
    notebook = project_root() / "notebooks" / "pair.ipynb"
    out = tmp_path / "pair"
    values = {"run_dir": str(out), "share": 0.001, "compiled": False}
    papermill.execute_notebook(notebook, tmp_path / "executed.ipynb", values, cwd=project_root())
    assert read_json(out / "record.json")["instruct"]["steps"] == 2
    tokenizer = AutoTokenizer.from_pretrained(out / "instruct")
    shipped = AutoTokenizer.from_pretrained(project_root() / "data" / "pair" / "instruct")
    chat = [{"role": "user", "content": "Привет"}]
    for each in (tokenizer, shipped):
        prompt = each.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert prompt == "<|user|>Привет<|end|><|assistant|>"
        assert each.decode(each("Где живёт волк?")["input_ids"]) == "Где живёт волк?"
    model = AutoModelForCausalLM.from_pretrained(out / "base")
    assert model.config.tie_word_embeddings and model.config.vocab_size == len(tokenizer)
    assert verify(out / "instruct")["tied"]
