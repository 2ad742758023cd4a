"""Every task's prompt template.

A prompt is the shots, each a question with its answer, and the question that is asked, with
`between` between them. The answer ends before the first of the texts `stop`. Names in braces are
fields of an example.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Template:
    """How an example is asked (`question`), and how a shot continues (`answer`)."""

    question: str
    answer: str
    stop: tuple[str, ...] = ()
    between: str = "\n\n"

    def ask(self, example: Mapping[str, Any]) -> str:
        return self.question.format(**example)

    def shot(self, example: Mapping[str, Any]) -> str:
        """The question with its answer, and the text between it and the next."""
        return self.ask(example) + self.answer.format(**example) + self.between

    def stops(self, example: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(text.format(**example) for text in self.stop)


TEMPLATES = {
    "gsm8k": Template("Question: {question}\nAnswer:", " {answer}", ("\nQuestion:",)),
    # The labels, with the spaces behind them, are those of the language's own examples, where the
    # folder has them: "Question: " and "Step-by-Step Answer:", "问题：" and "逐步解答：".
    "mgsm": Template(
        "{question_label}{question}\n{answer_label}", "{answer}", ("\n{question_label}",)
    ),
    "translation": Template("Text: {source}\nEnglish:", " {targets}", ("\n",)),
    # Chen et al. 2021, arXiv 2107.03374 §2.1.
    "humaneval": Template(
        "{prompt}", "{canonical_solution}", ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    ),
    # Austin et al. 2021, arXiv 2108.07732 §4.
    "mbpp": Template(
        "You are an expert Python programmer, and here is your task: {text} Your code should pass "
        "these tests:\n\n{tests}\n[BEGIN]\n",
        "{code}\n[DONE]",
        ("[DONE]",),
    ),
    "code_to_text": Template("Code: {code}\nDescription:", " {targets}", ("\n",)),
    "choices": Template("{inputs}", " {targets}"),
    "text": Template("", ""),
    # A user's own prompts, as they stand.
    "own": Template("{inputs}", "{targets}"),
}
