"""Folders of tokenizer files in the forms that published models have, trained on a little text."""

import json
import pathlib
from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = """The quick brown fox jumps over the lazy dog. Hello, how are you today? I am fine, thanks.
Wer reitet so spät durch Nacht und Wind? Es ist der Vater mit seinem Kind. Grüße aus Köln!
Ich weiß nicht, was soll es bedeuten. Где-то далеко шумит море, и ветер поёт свою песню.
春眠不覺曉,處處聞啼鳥。 こんにちは、世界。 नमस्ते दुनिया 1 + 1 = 2; 12345 × 678.
""".splitlines()

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

LLAMA3_CHAT = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA_CHAT = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
QWEN_CHAT = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MISTRAL_CHAT = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] + eos_token }}{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""


def llama3(folder: pathlib.Path, text: Sequence[str] = TEXT, size: int = 600) -> pathlib.Path:
    """Byte-level BPE; chat turns end in another token than texts."""
    tokenizer = _byte_level(LLAMA3_SPLIT, text, size, normalizer=None)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_special_tokens([*special, "<|eot_id|>"])
    bos = special[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    ends = [tokenizer.token_to_id(token) for token in ("<|end_of_text|>", "<|eot_id|>")]
    config = {"bos_token": bos, "eos_token": "<|eot_id|>", "chat_template": LLAMA3_CHAT}
    return _write(folder, tokenizer, config, {"eos_token_id": ends})


def qwen(folder: pathlib.Path, text: Sequence[str] = TEXT, size: int = 600) -> pathlib.Path:
    """Byte-level BPE behind NFC, without a start token; its chat templates have names."""
    tokenizer = _byte_level(QWEN_SPLIT, text, size, normalizer=normalizers.NFC())
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([tokenizers.AddedToken("<tool_call>", normalized=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    added = tokenizer.get_added_tokens_decoder()
    config = {
        "bos_token": None,
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "added_tokens_decoder": {
            index: {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for index, token in added.items()
        },
        "chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": QWEN_CHAT},
        ],
    }
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    return _write(folder, tokenizer, config, {"eos_token_id": ends})


def gemma(folder: pathlib.Path, text: Sequence[str] = TEXT, size: int = 800) -> pathlib.Path:
    """BPE with byte fallback and no space before a text; the chat template is a file."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = _byte_fallback(special, text, size)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos>:0 $A:0", pair="<bos>:0 $A:0 <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    _write(folder, tokenizer, config | {"pad_token": "<pad>"}, {"eos_token_id": [1, 6]})
    (folder / "chat_template.jinja").write_text(GEMMA_CHAT)
    return folder


def mistral(folder: pathlib.Path, text: Sequence[str] = TEXT, size: int = 800) -> pathlib.Path:
    """Llama 2's and Mistral's BPE with byte fallback and a space before a text."""
    tokenizer = _byte_fallback(["<unk>", "<s>", "</s>"], text, size)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    config = {"legacy": False, "chat_template": MISTRAL_CHAT, "model_max_length": 64}
    _write(folder, tokenizer, config, {"eos_token_id": 2})
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    names["unk_token"] = "<unk>"
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder


FAMILIES = {"llama3": llama3, "qwen": qwen, "gemma": gemma, "mistral": mistral}


def _byte_level(split, text, size, normalizer) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=split == LLAMA3_SPLIT))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def _byte_fallback(special: list[str], text: Sequence[str], size: int) -> tokenizers.Tokenizer:
    first = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=first, limit_alphabet=150, show_progress=False
    )
    learner.train_from_iterator(text, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def _write(folder: pathlib.Path, tokenizer, config: dict, generation: dict) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
