"""Writes what transformers makes of the folders of `published_tokenizers`, for the default tests.

PYTHONPATH=tests python tests/parity/make_tokenizer_golden.py
"""

import json
import pathlib
import tempfile
from typing import Any

import published_tokenizers
import transformers

TARGET = pathlib.Path(__file__).parents[1] / "data" / "golden" / "published_tokenizers.json"


def reading(folder: pathlib.Path) -> dict[str, Any]:
    """Ids of texts, texts of ids, and ends of answers, as transformers has them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = {text: tokenizer(text)["input_ids"] for text in published_tokenizers.TEXTS}
    continued = []
    for prompt, answer in published_tokenizers.CONTINUATIONS:
        before = tokenizer(prompt)["input_ids"]
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        start, whole = (
            tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row in (before, before + ids)
        )
        continued.append([before, ids, whole.removeprefix(start)])
    try:
        generation = transformers.GenerationConfig.from_pretrained(folder)
    except OSError:
        config = transformers.AutoConfig.from_pretrained(folder)
        generation = transformers.GenerationConfig.from_model_config(config)
    named = json.loads((folder / "config.json").read_text()).get("eos_token_id")
    told = (folder / "generation_config.json").exists() or named is not None
    ends = generation.eos_token_id if told else tokenizer.eos_token_id
    return {
        "texts": texts,
        "continued": continued,
        "ends": sorted(ends if isinstance(ends, list) else [ends]),
        "size": len(tokenizer),
    }


def readings() -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, write) in enumerate(published_tokenizers.FOLDERS.items()):
            folder = pathlib.Path(temporary, str(number))
            write(folder)
            found[name] = reading(folder)
    return found


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(readings(), indent=1, ensure_ascii=False) + "\n")
