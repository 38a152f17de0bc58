"""The family table of docs/families.md: each family's published form, tiny and random, through every command.

`python tests/test_families.py` writes the table; the tests compare it, family by family.
"""

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, ENGLISH, RUSSIAN
from safetensors.torch import load_file, save_file
from test_vocab_families import every_split_spec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig
from typer.testing import CliRunner

from ruadapt.cli import app
from ruadapt.files import project_root
from ruadapt.vocab.spec import build, read_spec

PAGE = project_root() / "docs" / "families.md"
NUMBERS = " ".join(map(str, [*range(10, 30), 100, 365, 1000, 1987, 1999, 2024] * 4))
CORPUS = [*ENGLISH.splitlines() * 4, *RUSSIAN.splitlines(), NUMBERS]
# The words that a byte-level family cuts a line into, as their files have it.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}" + REST
COMMANDS = ("certify", "extend", "optimize", "replace", "verify", "init", "lep")


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(
    *before: pre_tokenizers.PreTokenizer,
    after: tuple[pre_tokenizers.PreTokenizer, ...] = (),
    first: tuple[str, ...] = (),
    last: tuple[str, ...] = (),
    normalizer: normalizers.Normalizer | None = None,
    every_split: bool = False,
    words: bool = False,
    start: str = "",
    rows: int = 560,
) -> Tokenizer:
    """Learn a byte-level BPE; `words`: GPT-2's own, special tokens first or last."""
    made = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    steps = [*before, letters, *after]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else letters
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=rows, special_tokens=list(first), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    if every_split:
        made = build(every_split_spec(made))
    made.add_special_tokens(list(last))
    if start:
        opening = start.split()
        named = [(token, made.token_to_id(token)) for token in opening]
        made.post_processor = TemplateProcessing(single=[*opening, "$A"], special_tokens=named)
    return made


def sentence_piece(
    specials: tuple[str, ...] = ("<unk>", "<s>", "</s>"),
    spaces: str = "prepend",
    last: tuple[AddedToken, ...] = (),
    start: str = "<s>",
) -> Tokenizer:
    """Learn a BPE with bytes to fall back to; `spaces` tells what marks them."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = split(r"▁?[^▁\d]+|\d|▁")
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, show_progress=False))
    learned = read_spec(learner)["model"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    pairs = list(map(tuple, learned["merges"]))
    model = models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = Tokenizer(model)
    undone = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaces == "first":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        marks = normalizers.Replace(" ", "▁")
        before = [normalizers.Prepend("▁"), marks]
        made.normalizer = normalizers.Sequence(before) if spaces == "prepend" else marks
    if spaces == "split":
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    if spaces in ("first", "prepend"):
        undone.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(undone)
    made.add_special_tokens(list(specials))
    made.add_tokens(list(last))
    made.post_processor = TemplateProcessing(
        single=[start, "$A"], special_tokens=[(start, made.token_to_id(start))]
    )
    return made


def named(kind: str, eos: str, bos: str | None = None, **others: Any) -> dict[str, Any]:
    chat = {"chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False}
    roles = {"bos_token": bos, "eos_token": eos}
    return {"tokenizer_class": kind} | {k: v for k, v in roles.items() if v} | chat | others


# A tokenizer's form: how its file is made, and what its tokenizer_config.json says.
Words = tuple[Callable[[], Tokenizer], dict[str, Any]]
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPACES = tuple(AddedToken(" " * count, normalized=True) for count in range(24, 1, -1))
QWEN: Words = (
    lambda: byte_level(split(CONTRACTIONS + r"\p{N}" + REST), normalizer=normalizers.NFC(), last=IM + VISION),
    named("Qwen2Tokenizer", "<|im_end|>", pad_token="<|endoftext|>", add_prefix_space=False),
)
LLAMA2: Words = (sentence_piece, named("LlamaTokenizer", "</s>", "<s>", unk_token="<unk>"))
LLAMA3: Words = (
    lambda: byte_level(
        split(CONTRACTIONS + r"\p{N}{1,3}" + REST),
        every_split=True,
        last=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
        start="<|begin_of_text|>",
    ),
    named("PreTrainedTokenizerFast", "<|eot_id|>", "<|begin_of_text|>"),
)
MISTRAL3: Words = (
    lambda: sentence_piece(("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), spaces="first"),
    named("LlamaTokenizer", "</s>", "<s>", unk_token="<unk>"),
)


def tekken(kind: str) -> Words:
    specials = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>")
    return (
        lambda: byte_level(split(TEKKEN), first=specials, every_split=True, start="<s>"),
        named(kind, "</s>", "<s>", unk_token="<unk>", pad_token="<pad>"),
    )


def gemma(*more: str) -> Words:
    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    last = tuple(AddedToken(token, special=True, normalized=False) for token in more)
    return (
        lambda: sentence_piece(specials, "split" if more else "replace", last, "<bos>"),
        named("GemmaTokenizer", "<eos>", "<bos>", unk_token="<unk>", pad_token="<pad>"),
    )


GPT2: Words = (lambda: byte_level(words=True, last=("<|endoftext|>",)), {"model_max_length": 1024})


def neox() -> Tokenizer:
    first = ("<|endoftext|>", "<|padding|>")
    made = byte_level(words=True, first=first, normalizer=normalizers.NFC())
    made.add_tokens(list(SPACES))
    return made


def codegen() -> Tokenizer:
    made = byte_level(words=True, last=("<|endoftext|>",))
    made.add_tokens(list(SPACES))
    return made


def with_holes() -> Tokenizer:
    """Phi-4-mini's special tokens: ids between them have none."""
    made = byte_level(split(TEKKEN.replace(r"\p{N}", r"\p{N}{1,3}")))
    spec = read_spec(made)
    end = len(spec["model"]["vocab"])
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = {end: "<|endoftext|>", end + 7: "<|end|>", end + 9: "<|assistant|>"}
    spec["added_tokens"] = [{"id": number, "content": name, **token} for number, name in names.items()]
    spec["model"]["vocab"] |= {name: number for number, name in names.items()}
    return build(spec)


NEOX: Words = (neox, named("GPTNeoXTokenizer", "<|endoftext|>", "<|endoftext|>"))
CODEGEN: Words = (codegen, named("CodeGenTokenizer", "<|endoftext|>", "<|endoftext|>"))
PHI3: Words = (
    lambda: sentence_piece(
        last=(
            AddedToken("<|endoftext|>", special=True, normalized=False),
            AddedToken("<|assistant|>", special=True, normalized=False, rstrip=True),
            AddedToken("<|user|>", special=True, normalized=False, rstrip=True),
        )
    ),
    named("LlamaTokenizer", "<|endoftext|>", "<s>", unk_token="<unk>", pad_token="<|endoftext|>"),
)
CL100K: Words = (
    lambda: byte_level(split(CONTRACTIONS + r"\p{N}{1,3}" + REST), last=IM),
    named("GPT2Tokenizer", "<|im_end|>", "<|endoftext|>", pad_token="<|endoftext|>"),
)
HOLES: Words = (
    with_holes,
    named("GPT2Tokenizer", "<|endoftext|>", "<|endoftext|>", pad_token="<|endoftext|>"),
)
FALCON: Words = (
    lambda: byte_level(
        pre_tokenizers.Punctuation("contiguous"),
        words=True,
        after=(pre_tokenizers.Digits(individual_digits=False), split("[0-9][0-9][0-9]")),
        first=(">>TITLE<<", ">>ABSTRACT<<"),
        last=("<|endoftext|>",),
    ),
    named("PreTrainedTokenizerFast", "<|endoftext|>"),
)
STARCODER: Words = (
    lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), words=True, first=IM),
    named("GPT2Tokenizer", "<|im_end|>", "<|im_start|>", pad_token="<|im_end|>"),
)
YI: Words = (
    lambda: sentence_piece(("<unk>", "<|startoftext|>", "<|endoftext|>"), "first", start="<|startoftext|>"),
    named("LlamaTokenizer", "<|endoftext|>", "<|startoftext|>", unk_token="<unk>"),
)
GLM4: Words = (
    lambda: byte_level(
        split(CONTRACTIONS + r"\p{N}{1,3}" + REST),
        last=("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
        every_split=True,
        start="[gMASK] <sop>",
    ),
    named("PreTrainedTokenizerFast", "<|endoftext|>", pad_token="<|endoftext|>"),
)
DEEPSEEK: Words = (
    lambda: byte_level(
        split(r"\p{N}{1,3}"),
        split("[一-龥぀-ゟ゠-ヿ]+"),
        split(
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+" + REST
        ),
        first=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
        start="<｜begin▁of▁sentence｜>",
    ),
    named("LlamaTokenizerFast", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
)
SLOW: Words = (lambda: byte_level(), {"tokenizer_class": "ChatGLM4Tokenizer"})


@dataclass(frozen=True)
class Family:
    """A model family: its tokenizer, and its config.json as published but for sizes.

    `rows` more than the tokenizer has are padding, or fewer. Ids are named by their tokens.
    """

    words: Words
    architecture: str
    kind: str
    config: dict[str, Any]
    padding: int = 0
    tokens: dict[str, str] = field(default_factory=dict)
    nested: bool = False  # sizes are in `text_config`
    spoil: Callable[[Path], None] | None = None
    form: str = ""


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GQA = SIZES | {"num_key_value_heads": 1}
HEADS = GQA | {"head_dim": 8}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
PIXTRAL = {"model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
INTERLEAVED = {"mrope_section": [2, 1, 1], "rope_type": "default", "mrope_interleaved": True}
VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
GEMMA2 = {"sliding_window": 64, "query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0}
DEEP = SIZES | {
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 8,
    "num_nextn_predict_layers": 1,
}


def with_code(folder: Path) -> None:
    """Modules of the folder's own beside an architecture that transformers has, too."""
    (folder / "modeling_own.py").write_text("from transformers import AutoModelForCausalLM\n")
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling_own.AutoModelForCausalLM"})


def bare_names(folder: Path) -> None:
    """GPT-2's file: no prefix, and masks of attention that no model loads."""
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, path, {"format": "pt"})


def mtp(folder: Path) -> None:
    """DeepSeek's layer for multi-token prediction, with embeddings of its own."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})


def fp8(folder: Path) -> None:
    mtp(folder)
    edit(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


def foreign(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    edit(folder, model_type="chatglm", architectures=["ChatGLMModel"])


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FAMILIES = {
    "Llama 2": Family(LLAMA2, "LlamaForCausalLM", "llama", GQA | UNTIED),
    "Llama 3, 3.1": Family(LLAMA3, "LlamaForCausalLM", "llama", GQA | UNTIED),
    "Llama 3.2": Family(LLAMA3, "LlamaForCausalLM", "llama", HEADS | TIED, form="tied"),
    "Yi": Family(YI, "LlamaForCausalLM", "llama", GQA | UNTIED),
    "SmolLM, SmolLM2": Family(STARCODER, "LlamaForCausalLM", "llama", GQA | TIED),
    "SmolLM3": Family(
        LLAMA3,
        "SmolLM3ForCausalLM",
        "smollm3",
        GQA,
        tokens={"pad_token_id": "<|end_of_text|>"},
        form="tied by default",
    ),
    "Mistral 7B v0.1": Family(LLAMA2, "MistralForCausalLM", "mistral", GQA | UNTIED),
    "Mistral 7B v0.3": Family(MISTRAL3, "MistralForCausalLM", "mistral", GQA | UNTIED),
    "Mistral-Nemo": Family(
        tekken("PreTrainedTokenizerFast"), "MistralForCausalLM", "mistral", HEADS | UNTIED
    ),
    "Mistral Small 3.1": Family(
        tekken("LlamaTokenizerFast"),
        "Mistral3ForConditionalGeneration",
        "mistral3",
        {
            "text_config": HEADS | {"model_type": "mistral"},
            "vision_config": SIZES | PIXTRAL,
            "spatial_merge_size": 2,
        },
        tokens={"image_token_index": "[IMG]"},
        nested=True,
        form="text_config",
    ),
    "Mixtral": Family(
        LLAMA2, "MixtralForCausalLM", "mixtral", GQA | UNTIED | {"num_local_experts": 2}, form="experts"
    ),
    "Qwen2, Qwen2.5": Family(QWEN, "Qwen2ForCausalLM", "qwen2", GQA | TIED, padding=71),
    "Qwen2.5, 7B and larger": Family(QWEN, "Qwen2ForCausalLM", "qwen2", GQA | UNTIED, padding=71),
    "Qwen2-MoE": Family(
        QWEN,
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        GQA | UNTIED | EXPERTS | {"shared_expert_intermediate_size": 16},
        padding=71,
        form="experts",
    ),
    "Qwen3": Family(QWEN, "Qwen3ForCausalLM", "qwen3", HEADS | TIED, padding=71),
    "Qwen3-MoE": Family(
        QWEN, "Qwen3MoeForCausalLM", "qwen3_moe", HEADS | UNTIED | EXPERTS, padding=71, form="experts"
    ),
    "Qwen2-VL": Family(
        QWEN,
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        GQA
        | UNTIED
        | MROPE
        | {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}},
        padding=71,
        tokens=VISION_TOKENS,
        form="pictures; a flat config",
    ),
    "Qwen3-VL": Family(
        QWEN,
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        {
            "text_config": HEADS | TIED | {"model_type": "qwen3_vl_text", "rope_scaling": INTERLEAVED},
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 16,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        }
        | TIED,
        padding=71,
        tokens=VISION_TOKENS,
        nested=True,
        form="pictures; text_config",
    ),
    "Gemma": Family(gemma(), "GemmaForCausalLM", "gemma", HEADS, form="tied by default"),
    "Gemma 2": Family(gemma(), "Gemma2ForCausalLM", "gemma2", HEADS | GEMMA2, form="tied by default"),
    "Gemma 3, 270M and 1B": Family(
        gemma("<image_soft_token>"),
        "Gemma3ForCausalLM",
        "gemma3_text",
        HEADS | {"sliding_window": 64, "query_pre_attn_scalar": 8},
        padding=-1,
        form="a token without a row",
    ),
    "Gemma 3, 4B and larger": Family(
        gemma("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {
            "text_config": HEADS | {"model_type": "gemma3_text", "sliding_window": 64},
            "vision_config": SIZES | SIGLIP,
            "mm_tokens_per_image": 4,
        },
        padding=64,
        tokens={
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "image_token_index": "<image_soft_token>",
        },
        nested=True,
        form="pictures; text_config",
    ),
    "Gemma 3n": Family(
        gemma("<image_soft_token>"),
        "Gemma3nForCausalLM",
        "gemma3n_text",
        HEADS
        | {
            "hidden_size_per_layer_input": 4,
            "intermediate_size": [32],
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0],
            "layer_types": ["full_attention"],
            "vocab_size_per_layer_input": 500,
        },
        form="embeddings of each layer",
    ),
    "Phi-2": Family(CODEGEN, "PhiForCausalLM", "phi", SIZES | UNTIED, padding=20, form="a bias of the head"),
    "Phi-3": Family(
        PHI3, "Phi3ForCausalLM", "phi3", GQA | UNTIED, padding=12, spoil=with_code, form="code beside it"
    ),
    "Phi-4": Family(CL100K, "Phi3ForCausalLM", "phi3", GQA | UNTIED),
    "Phi-4-mini": Family(
        HOLES, "Phi3ForCausalLM", "phi3", GQA | TIED, padding=40, spoil=with_code, form="holes in the ids"
    ),
    "Falcon 7B": Family(
        FALCON,
        "FalconForCausalLM",
        "falcon",
        SIZES | {"multi_query": True, "parallel_attn": True, "bias": False, "alibi": False},
        form="tied by default",
    ),
    "Falcon 3": Family(LLAMA3, "LlamaForCausalLM", "llama", HEADS | UNTIED),
    "GPT-NeoX, Pythia": Family(
        NEOX, "GPTNeoXForCausalLM", "gpt_neox", SIZES | UNTIED, padding=27, form="own names"
    ),
    "GPT-2": Family(
        GPT2,
        "GPT2LMHeadModel",
        "gpt2",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
        tokens={"bos_token_id": "<|endoftext|>", "eos_token_id": "<|endoftext|>"},
        spoil=bare_names,
        form="tied by default; eos known to its class alone",
    ),
    "OLMo": Family(NEOX, "OlmoForCausalLM", "olmo", GQA | TIED, padding=27),
    "OLMo 2": Family(CL100K, "Olmo2ForCausalLM", "olmo2", GQA | UNTIED, padding=74),
    "Granite 3": Family(
        STARCODER, "GraniteForCausalLM", "granite", GQA | TIED | {"embedding_multiplier": 12.0}
    ),
    "GLM-4-0414": Family(GLM4, "Glm4ForCausalLM", "glm4", HEADS | UNTIED, padding=40),
    "GLM-4-9B-hf": Family(GLM4, "GlmForCausalLM", "glm", HEADS | UNTIED, padding=40),
    "ChatGLM3, GLM-4-9B": Family(
        SLOW, "LlamaForCausalLM", "llama", GQA | UNTIED, spoil=foreign, form="code of its own"
    ),
    "DeepSeek-V3": Family(
        DEEPSEEK, "DeepseekV3ForCausalLM", "deepseek_v3", DEEP | UNTIED, spoil=fp8, form="8-bit"
    ),
    "DeepSeek-V3, in 16 bits": Family(
        DEEPSEEK, "DeepseekV3ForCausalLM", "deepseek_v3", DEEP | UNTIED, spoil=mtp, form="MTP layer"
    ),
    "DeepSeek-V3, saved by transformers": Family(
        DEEPSEEK, "DeepseekV3ForCausalLM", "deepseek_v3", DEEP | UNTIED, form="experts"
    ),
}


@cache
def learned(build_words: Callable[[], Tokenizer]) -> str:
    return build_words().to_str()


def make_pair(family: Family, folder: Path) -> tuple[Path, Path]:
    """Write base and instruct model of a family."""
    build_words, about = family.words
    words = Tokenizer.from_str(learned(build_words))
    height = max(words.get_vocab().values()) + 1 + family.padding
    ids: dict[str, Any] = {name: words.token_to_id(token) for name, token in family.tokens.items()}
    for role in ("bos_token", "eos_token", "pad_token"):
        if role in about:
            ids[f"{role}_id"] = words.token_to_id(about[role])
    config = {"architectures": [family.architecture], "model_type": family.kind, **family.config, **ids}
    if family.nested:
        config["text_config"] = {**config["text_config"], "vocab_size": height}
    else:
        config["vocab_size"] = height
    if family.kind == "gemma3n_text":
        config["vocab_size_per_layer_input"] = height
    base, instruct = folder / "base", folder / "instruct"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        base.mkdir(parents=True)
        (base / "config.json").write_text(json.dumps(config))
        model = getattr(transformers, family.architecture)(AutoConfig.from_pretrained(base))
        for target in (base, instruct):
            model.to(torch.bfloat16).save_pretrained(target)
            (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
            words.save(str(target / "tokenizer.json"))
            (target / "tokenizer_config.json").write_text(json.dumps(about))
            if family.spoil:
                family.spoil(target)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
    return base, instruct


def try_commands(family: Family, folder: Path) -> dict[str, str]:
    """Return what each command says: nothing where it works."""
    base, instruct = make_pair(family, folder)
    (folder / "ru.txt").write_text(RUSSIAN * 2, encoding="utf-8")
    (folder / "both.txt").write_text((ENGLISH + "\n" + RUSSIAN) * 2, encoding="utf-8")
    run, said = CliRunner(), {}

    def call(command: str, *arguments: object) -> bool:
        result = run.invoke(app, list(map(str, arguments)))
        assert result.exit_code in (0, 1, 2), (command, result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        if result.exit_code:
            text = (result.stderr or result.stdout).strip().splitlines()[-1].removeprefix("ruadapt: ")
            text = text.replace(f"{folder}/", "")
            said[command] = text if result.exit_code == 2 else result.stdout
        return not result.exit_code

    call("certify", "tokenizer", "certify", base, base, "--strict")
    call("verify", "verify", base)
    sizes = {
        "extend": ["--added-rows", 40],
        "optimize": ["--added-rows", 40, "--keep-rows", 420, "--used-on", folder / "both.txt"],
        "replace": ["--vocab-size", 700],
    }
    for how, options in sizes.items():
        text = folder / ("both.txt" if how == "replace" else "ru.txt")
        words, adapted = folder / how, folder / f"{how}-base"
        if call(how, "tokenizer", how, base, words, *options, "--text", text) and call(
            "init", "init", base, words, adapted
        ):
            call("lep", "lep", base, instruct, adapted, folder / f"{how}-instruct")
    if "init" in said:
        call("lep", "lep", base, instruct, base, folder / "none")
    return {command: said[command] for command in COMMANDS if command in said}


def row(name: str, folder: Path) -> str:
    family = FAMILIES[name]
    reasons: dict[str, list[str]] = {}
    for command, text in try_commands(family, folder).items():
        reasons.setdefault(re.split("; | \\(", text)[0].removeprefix("base: "), []).append(command)
    told = "; ".join(f"{', '.join(commands)} refused: {reason}" for reason, commands in reasons.items())
    architecture = json.loads((folder / "instruct" / "config.json").read_text())["architectures"][0]
    return f"| {name} | {architecture} | {family.form} | {told or 'works'} |"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_tells_what_happens(name: str, tmp_path: Path) -> None:
    assert row(name, tmp_path) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_table_has_no_other_families() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert names[2:] == [*FAMILIES]  # below the head


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        rows = [row(name, Path(place) / str(number)) for number, name in enumerate(FAMILIES)]
    head = text[: text.index("| --- |")].rstrip("\n").splitlines()
    below = text[text.index("| --- |") :].splitlines()
    rest = [line for line in below[1:] if not line.startswith("| ")]
    PAGE.write_text("\n".join([*head, below[0], *rows, *rest]) + "\n", encoding="utf-8")
