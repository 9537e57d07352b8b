"""Conditions on measured quantities, as text: ``"max_logit > 100 and entropy_min < 0.2"``."""

import ast
import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping

_COMPARE: dict[type, Callable[[float, float], bool]] = {
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le,
}  # fmt: skip


class Condition:
    """A comparison of quantities with numbers, joined by ``and``, ``or`` and ``not``, in brackets where needed.

    Args:
        text: For instance ``"max_logit > 100"`` or ``"0 < entropy_min < 0.2"``.
        names: The quantities there are.
        argument: Name of the argument, for messages.

    Raises:
        ValueError: If the text is no such condition, or names something else.

    Example:
        >>> Condition("max_logit > 100 or entropy_min < 0.1", ["max_logit", "entropy_min"])({"max_logit": 120.0})
        True
    """

    def __init__(self, text: str, names: Iterable[str], argument: str = "when") -> None:
        self.text, self.argument = text, argument
        self._known = sorted(names)
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, AttributeError) as error:
            raise ValueError(self._message("")) from error
        self.quantities = frozenset(self._check(self._tree))
        if not self.quantities:
            raise ValueError(self._message(" It names no quantity."))

    def __call__(self, values: Mapping[str, float]) -> bool:
        """Whether it holds. What depends on a quantity that was not measured, or on NaN, does not."""
        return self._holds(self._tree, values) is True

    def __repr__(self) -> str:
        return repr(self.text)

    def _check(self, node: ast.expr) -> set[str]:
        if isinstance(node, ast.BoolOp):
            return {name for value in node.values for name in self._check(value)}
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return self._check(node.operand)
        if not isinstance(node, ast.Compare) or any(type(op) not in _COMPARE for op in node.ops):
            raise ValueError(self._message(""))
        operands = [node.left, *node.comparators]
        return {name for operand in operands if (name := self._check_operand(operand))}

    def _check_operand(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            if node.id not in self._known:
                near = difflib.get_close_matches(node.id, self._known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(self._message(f" {node.id!r} is not measured.{hint}"))
            return node.id
        if _number(node) is None:
            raise ValueError(self._message(""))
        return ""

    def _message(self, reason: str) -> str:
        return (
            f"`{self.argument}` must compare measured quantities with numbers, as in 'max_logit > 100', got "
            f"{self.text!r}.{reason} There are {', '.join(self._known)}."
        )

    def _holds(self, node: ast.expr, values: Mapping[str, float]) -> bool | None:
        """True, False, or None for what is not known."""
        if isinstance(node, ast.BoolOp):
            parts = [self._holds(value, values) for value in node.values]
            decides = isinstance(node.op, ast.Or)
            return decides if decides in parts else None if None in parts else not decides
        if isinstance(node, ast.UnaryOp):
            inner = self._holds(node.operand, values)
            return None if inner is None else not inner
        assert isinstance(node, ast.Compare)
        numbers = [_value(operand, values) for operand in (node.left, *node.comparators)]
        pairs = list(zip(node.ops, numbers[:-1], numbers[1:], strict=True))
        if any(number is None or math.isnan(number) for number in numbers):
            return None
        return all(_COMPARE[type(op)](left, right) for op, left, right in pairs)  # type: ignore[arg-type]


def _number(node: ast.expr) -> float | None:
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    plain = node.operand if negative else node  # type: ignore[attr-defined]
    value = plain.value if isinstance(plain, ast.Constant) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return -value if negative else value


def _value(node: ast.expr, values: Mapping[str, float]) -> float | None:
    return values.get(node.id) if isinstance(node, ast.Name) else _number(node)
