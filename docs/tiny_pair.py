"""Two small random models as folders of Hugging Face, and questions to train their pair on.

python docs/tiny_pair.py     # writes downloads/, train.jsonl and validation.jsonl
"""

import json
import pathlib

from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import calm_jax
from calm_jax.data.vocabularies import load_vocabulary

COLOURS = {"rose": "red", "sky": "blue", "leaf": "green", "lemon": "yellow", "coal": "black"}
PHRASES = (
    "What colour is a {}?",
    "A {} is of which colour?",
    "Tell me the colour of a {}.",
    "Name the colour of a {}.",
    "Look at a {}. Its colour is",
    "Which colour has a {}?",
)

examples = [
    {"inputs": phrase.format(thing), "targets": f" {colour}"}
    for phrase in PHRASES
    for thing, colour in COLOURS.items()
]
# Every seventh is kept for validation: a thing and a phrase that never meet in training.
for name, chosen in {
    "train.jsonl": [example for number, example in enumerate(examples) if number % 7],
    "validation.jsonl": examples[::7],
}.items():
    pathlib.Path(name).write_text("".join(json.dumps(example) + "\n" for example in chosen))

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator(
    [example["inputs"] + example["targets"] for example in examples],
    trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
)
tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
folder = pathlib.Path("downloads/tokenizer")
folder.mkdir(parents=True, exist_ok=True)
tokenizer.save(str(folder / "tokenizer.json"))
special = {"bos_token": "<s>", "eos_token": "</s>"}
(folder / "tokenizer_config.json").write_text(json.dumps(special))

vocabulary = load_vocabulary(folder / "tokenizer.json")
for seed, (name, width) in enumerate({"large": 128, "small": 64}.items()):
    config = calm_jax.DecoderConfig.llama(
        vocab_size=vocabulary.size,
        embed_dim=width,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=width // 4,
        mlp_dim=3 * width,
    )
    decoder = calm_jax.Decoder(config, nnx.Rngs(seed))
    calm_jax.save_frozen(decoder, f"downloads/frozen_{name}", vocabulary=vocabulary)
    calm_jax.export(f"downloads/frozen_{name}", f"downloads/{name}")
