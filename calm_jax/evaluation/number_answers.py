"""The final number of an answer, however it is written."""

import re
import unicodedata
from decimal import Decimal

# What stands before the final number where a text says which one that is: GSM8K's own mark, and the
# phrase that chains of thought end with.
_MARKS = ("####", "answer is")
# Commas, apostrophes and narrow spaces between groups of digits; the last group has three, those
# before it two where numbers are grouped as in India.
_GROUPED = (
    r"\d{1,3}(?:[,'’\u066c\u00a0\u202f\u2009]\d{2,3})*[,'’\u066c\u00a0\u202f\u2009]\d{3}(?!\d)"
)
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-−–])?(?P<currency>[$€£¥₹])?"
    rf"(?:(?P<grouped>{_GROUPED})|(?P<plain>\d+))(?:[.,\u066b](?P<fraction>\d+))?"
)


def final_number(text: str) -> Decimal | None:
    """The final number of a text; None if it has none.

    The number after the first `####` counts, or else after the first "answer is"; without these
    the last one. Units and currencies around it do not matter, nor do separators of thousands, nor
    which digits it is written in. A comma before other than three digits is a decimal one.

    >>> final_number("She has 3 + 4 = 7 left. The answer is $1,007.50 a day.")
    Decimal('1007.50')
    """
    text = "".join(map(_as_ascii_digit, text))
    for mark in _MARKS:
        _, _, after = text.partition(mark)
        if first := _NUMBER.search(after):
            return _value(first)
    found = list(_NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def _as_ascii_digit(character: str) -> str:
    digit = unicodedata.decimal(character, None)
    return character if digit is None else str(digit)


def _value(found: re.Match) -> Decimal:
    whole = re.sub(r"\D", "", found["grouped"] or found["plain"])
    number = Decimal(f"{whole}.{found['fraction'] or 0}")
    return -number if found["sign"] else number
