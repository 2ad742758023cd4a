"""What transformers reads from the tokenizers of GGUF files, for the tests that run without it.

    python tests/parity/make_gguf_golden.py

writes, where the extra [parity] is installed, tests/checkpoints/convert/golden/gguf/FORM.json for
each family of tokenizers: `metadata`, as in the file without "tokenizer.", and the ids that
transformers makes of `texts`, with the start and end tokens that it puts.
"""

import json
import pathlib
import sys
import tempfile

import transformers

# For a run from any folder.
ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import gguf_files  # noqa: E402
import tiny_tokenizers  # noqa: E402

from tests.parity.test_gguf import CONFIGS, MODEL_OF, PRE, random_file  # noqa: E402
from tests.parity.test_tokenizers import HARD, SPECIALS  # noqa: E402

GOLDEN = ROOT / "tests/checkpoints/convert/golden/gguf"
SIZE = {"llama3": 350, "qwen": 350, "gemma": 500, "mistral": 500}
FLAGS = {"llama3": {"add_bos_token": True, "add_eos_token": True}, "gemma": {"add_bos_token": True}}
CHAT = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "Hallo!"}]


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for family, model in MODEL_OF.items():
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = tiny_tokenizers.FAMILIES[family](
                pathlib.Path(folder, "own"), size=SIZE[family]
            )
            metadata = gguf_files.tokenizer_metadata(tokenizer, **FLAGS.get(family, {}))
            if family in PRE:
                metadata["ggml.pre"] = PRE[family]
            config = CONFIGS[model](vocab_size=len(metadata["ggml.tokens"]), num_hidden_layers=1)
            random_file(pathlib.Path(folder, "model.gguf"), config, tokenizer=metadata)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        texts = [*HARD, *tiny_tokenizers.TEXT, *(f" {name} x{name}" for name in SPECIALS[family])]
        expected = {
            "family": model,
            "metadata": metadata,
            "texts": texts,
            "ids": tokenizer(texts)["input_ids"],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "chat": CHAT,
            "chat_text": tokenizer.apply_chat_template(CHAT, tokenize=False),
        }
        (GOLDEN / f"{family}.json").write_text(json.dumps(expected, ensure_ascii=False) + "\n")
        print(family, (GOLDEN / f"{family}.json").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
