"""Sums in numbers: the order of their operations, what each results in, and how they are written.

An operation names its two operands by their places in a list: K numbers of the expression, and
after them the results so far.
"""

from collections.abc import Sequence

from calm_jax.data.key_value import KeyValueConfig

Operation = tuple[int, str, int]


def in_order(operators: Sequence[str]) -> list[Operation]:
    """The operations of an expression with these operators: products first, then from the left."""
    waiting, left = list(range(len(operators) + 1)), list(operators)
    operations: list[Operation] = []
    while left:
        at = left.index("*") if "*" in left else 0
        operations.append((waiting[at], left.pop(at), waiting[at + 1]))
        waiting[at : at + 2] = [len(operators) + len(operations)]
    return operations


def results(numbers: Sequence[int], operations: Sequence[Operation]) -> list[int]:
    """What each operation on these numbers results in."""
    values = list(numbers)
    for first, operator, second in operations:
        one, other = values[first], values[second]
        values.append({"+": one + other, "-": one - other, "*": one * other}[operator])
    return values[len(numbers) :]


def written_out(
    operands: Sequence[str], operations: Sequence[Operation], results: Sequence[str]
) -> str:
    """The operations one after another: `12+7=19-3=16`, or `4*5=20;3+20=23`.

    One that begins with the last result goes on from it; any other follows a `;`.
    """
    texts, text = [*operands, *results], ""
    for place, (first, operator, second) in enumerate(operations, len(operands)):
        if first != place - 1:
            text += f";{texts[first]}"
        text += f"{operator}{texts[second]}={texts[place]}"
    return text.removeprefix(";") or operands[0]


def in_columns(
    operands: Sequence[str], operations: Sequence[Operation], results: Sequence[str]
) -> str:
    """Each operation's operator, then column by column a digit of both operands and of the result.

    In two digits, units first, 12+7=19 is `+279101`. A sum's digit stands beside those that it
    depends on: small models learn that in fewer steps than `21+70=91`.
    """
    texts, text = [*operands, *results], ""
    for place, (first, operator, second) in enumerate(operations, len(operands)):
        columns = zip(texts[first], texts[second], texts[place], strict=True)
        text += operator + "".join(map("".join, columns))
    return text or operands[0]


def numeral(number: int, config: KeyValueConfig) -> str:
    """A number as the config writes it.

    In 4 `complement_digits` 264 is 4620, and -264, whose ten's complement is 9736, is 6379. Sums
    and differences of such numbers are the same digit by digit, whatever their signs.
    """
    digits = config.complement_digits
    return str(number % 10**digits).zfill(digits)[::-1] if digits else str(number)


def answer(
    operands: Sequence[str],
    numbers: Sequence[int],
    operators: Sequence[str],
    config: KeyValueConfig,
) -> str:
    """What MATH asks for: operands written as `operands`, results of `numbers`."""
    operations = in_order(operators)
    found = [numeral(number, config) for number in results(numbers, operations)]
    if config.written_out and config.complement_digits:
        return in_columns(operands, operations, found)
    if config.written_out:
        return written_out(operands, operations, found)
    return [*operands, *found][-1]
