"""What a `Generator` refuses before it starts, and where its programs are kept."""

import jax
import pytest
import tiny_models
from random_models import llama, random_decoder

from calm_jax.__main__ import main
from calm_jax.checkpoints.frozen import save_frozen
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.decoding import Generator
from calm_jax.errors import CalmError


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(llama())


@pytest.mark.parametrize("dtype", ["int4", "int16", "bool", "float64", "foo", 3])
def test_a_dtype_that_would_change_answers_is_refused(decoder, dtype):
    with pytest.raises(CalmError, match=f"cache_dtype is {dtype!r}; known are float32"):
        Generator(decoder, max_length=32, cache_dtype=dtype)


def test_caches_larger_than_the_machine_are_refused(decoder):
    with pytest.raises(CalmError, match=r"caches of 8 rows of .* are free; \d+ rows would fit"):
        Generator(decoder, max_length=10**9)


@pytest.mark.parametrize("prompt", [None, ["ab"], [1.5], 3])
def test_a_prompt_that_is_neither_text_nor_ids(decoder, prompt):
    with pytest.raises(CalmError, match="a prompt is a text or a list of token ids, not"):
        Generator(decoder, max_length=32).generate([prompt])


class Ascii(ByteVocabulary):
    """Bytes, of which none is for other characters than those of ASCII."""

    def lost_character(self, text):
        return next((c for c in text if not c.isascii()), None)


def test_text_without_a_token_is_refused(decoder):
    generator = Generator(decoder, max_length=32)
    generator.vocabulary = Ascii()
    line = "prompt 1: the vocabulary has no token for '€' in '5 €'"
    with pytest.raises(CalmError, match=line):
        generator.generate(["5", "5 €"])
    with pytest.raises(CalmError, match=line):
        generator.score(["5 ", "5 "], ["6", "€"])


def test_programs_are_kept_on_disk(tmp_path, monkeypatch, capsys):
    vocabulary = ByteVocabulary()
    folder = tmp_path / "frozen"
    save_frozen(tiny_models.decoder(vocab_size=vocabulary.size), folder, vocabulary=vocabulary)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    set_to = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: set_to.append(setting))
    assert main(["generate", f"--workdir={folder}", "--prompt=a", "--max_new_tokens=1"]) == 0
    assert ("jax_compilation_cache_dir", str(tmp_path / "programs")) in set_to
