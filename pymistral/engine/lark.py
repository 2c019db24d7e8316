"""Which rules of a Lark grammar never end, and which of its terminals no text satisfies.

llguidance takes every byte that is the only one possible, before it looks for an end: with ``start: /a+/ x`` and ``x: x`` it takes ``a``
for ever, and nothing can stop it. So what no finite text satisfies is found here, in the text of a grammar that it has accepted.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..requests.json_schema import can_end

logger = logging.getLogger(__name__)

# llguidance's tokens (parser/src/lark/lexer.rs in its sources), the longer before the shorter. What follows %json and its like is JSON.
_TOKENS = re.compile(
    r"""(?P<skip>(?:\#|//)[^\n]*|[ \t]+)
    |(?P<newline>(?:\r?\n)+[ \t]*)
    |(?P<string>"(?:\\.|[^"\\\n])*"i?)
    |(?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
    |(?P<json>%(?:json|regex|llguidance)(?![a-z]))
    |(?P<keyword>%[a-z]+)
    |(?P<rule>!?[_?]?[a-z][_a-z0-9-]*)
    |(?P<terminal>_?[A-Z][_A-Z0-9-]*)
    |(?P<number>0[xX][0-9a-fA-F]+|[+-]?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)
    |(?P<special><[^<>\s]+>)
    |(?P<grammar>@[a-zA-Z0-9_-]+)
    |(?P<mark>->|\.\.|::|[+*?:,.(){}\[\]~|&=_])""",
    re.VERBOSE | re.DOTALL,
)
_ENDS_OF_AN_EXPANSION = frozenset({"|", ")", "]", "}", "&", "->", "%if"})

Name = tuple[str, str]
"""A grammar, and a rule or a terminal in it."""


class Needs(NamedTuple):
    """What a text must hold: all of these, or one of them; names stand for rules. All of nothing is the empty text."""

    enough: Any  # all or any
    parts: Sequence[Name | Needs]


NOTHING = Needs(all, [])
NEVER = Needs(any, [])


class Rule(NamedTuple):
    """What a rule needs, and all the rules that it mentions."""

    needs: Needs
    mentions: list[Name]


def endless(kind: str, text: str) -> str | None:
    """What of the grammar can be reached and never ends, in words; None if nothing does, or if such a grammar has no rules."""
    if kind not in ("lark", "llguidance"):
        return None
    rules: dict[Name, Rule] = {}
    try:
        grammars = {"": text} if kind == "lark" else _named(json.loads(text)["grammars"])
        for of, grammar in grammars.items():
            if isinstance(grammar, str):
                _Parser(list(_tokens(grammar)), of, rules).items()
            else:
                rules[of, "start"] = Rule(_needs_of_json(grammar), [])
    except (ValueError, LookupError) as error:  # llguidance reads what this does not
        logger.debug("the grammar is not checked for rules without an end: %r", error)
        return None
    name = _endless_name(rules, (next(iter(grammars)), "start"))
    if name is None:
        return None
    if _is_terminal(name):
        return f"no text can satisfy the terminal {name[1] if name[1][0] == '/' else repr(name[1])}: change it, or leave out what needs it"
    return f"no text can satisfy the rule {name[1]!r}, which never ends: give it an alternative that does not lead back to it"


def _named(grammars: list[dict[str, Any]]) -> dict[str, Any]:
    return {entry.get("name") or f" {number}": entry.get("lark_grammar", entry.get("json_schema")) for number, entry in enumerate(grammars)}


def _is_terminal(name: Name) -> bool:
    """A regex that stands in a rule is a terminal of its own name."""
    return name[1][0] == "/" or name[1].isupper()


def _endless_name(rules: dict[Name, Rule], start: Name) -> Name | None:
    reached: dict[Name, None] = {}
    waiting = [start]
    while waiting:
        if (name := waiting.pop()) not in reached and name in rules:
            reached[name] = None
            waiting += rules[name].mentions
    left, before = set(reached), 0
    while len(left) != before:
        before = len(left)
        for name in reversed(reached):  # those that others use come first, so that most are done in the first round
            if name in left and _ends(rules[name].needs, left):
                left.remove(name)
    if all(map(_is_terminal, left)):  # none, or some that can be left out
        return None
    # Of them one that leads back to itself, rather than one that uses it.
    name = next(name for name in reached if name in left and not _is_terminal(name))
    seen: set[Name] = set()
    while name not in seen:
        seen.add(name)
        name = next((other for other in rules[name].mentions if other in left), name)
    return name


def _ends(needs: Name | Needs, left: set[Name]) -> bool:
    return bool(needs.enough(_ends(part, left) for part in needs.parts)) if isinstance(needs, Needs) else needs not in left


def _needs_of_json(schema: Any) -> Needs:
    return NOTHING if can_end(schema) else NEVER


class Token(NamedTuple):
    kind: str
    text: str
    value: Any = None  # of JSON


def _tokens(text: str) -> Iterator[Token]:
    at = 0
    while at < len(text):
        match = _TOKENS.match(text, at)
        if match is None:
            raise ValueError(f"character {at} begins no token")
        at = match.end()
        kind = str(match.lastgroup)
        if kind == "json":
            at = re.compile(r"\s*").match(text, at).end()  # type: ignore[union-attr]
            value, at = json.JSONDecoder().raw_decode(text, at)
            yield Token(match[0], text[match.start() : at], value)
        elif kind in ("mark", "keyword"):
            yield Token(match[0], match[0])
        elif kind != "skip":
            yield Token(kind, match[0])


def _may_be_empty(token: Token) -> bool:
    """Whether a regex has a class that can be without characters, as ``[^\\s\\S]`` is; what else a regex says has some text."""
    return token.kind == "regex" and any(mark in token.text for mark in ("[^", "&&", "--", "~~", "\\P", "\\p"))


class _Parser:
    """Reads the rules of one grammar into ``rules``. It is lenient: llguidance has accepted the text."""

    def __init__(self, tokens: list[Token], grammar: str, rules: dict[Name, Rule]) -> None:
        self.tokens, self.at = tokens, 0
        self.grammar, self.rules = grammar, rules
        self.mentions: list[Name] = []
        self.definitions: list[Token] = []  # of terminals

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].kind if self.at + ahead < len(self.tokens) else ""

    def take(self) -> Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def skip_to(self, *kinds: str) -> None:
        """Up to one of these outside of parentheses, or to the end."""
        depth = 0
        while (kind := self.kind()) and (depth or kind not in kinds):
            depth += (kind in ("(", "[", "{")) - (kind in (")", "]", "}"))
            self.at += 1

    def items(self) -> None:
        while kind := self.kind():
            if kind == "newline":
                self.at += 1
                continue
            if kind != "rule":
                self.item_without_rules()
                continue
            name = self.take().text.lstrip("!").removeprefix("?")
            self.skip_to(":")  # parameters, priority, attributes
            self.at += 1
            self.mentions = []
            needs = self.expansions()
            self.rules[self.grammar, name] = Rule(needs, self.mentions)
        mentioned = {name for rule in self.rules.values() for name in rule.mentions if name[0] == self.grammar}
        doubtful = {name for name in mentioned if name[1][0] == "/"}
        if any(token.kind in ("&", "~") or _may_be_empty(token) for token in self.definitions):  # else each of them has a text
            doubtful |= set(filter(_is_terminal, mentioned))
        empty = [name for name in doubtful if self.is_empty(name[1])]
        self.rules.update(dict.fromkeys(empty, Rule(NEVER, [])))

    def is_empty(self, terminal: str) -> bool:
        """Whether llguidance finds no text for a terminal; its effort is limited."""
        from llguidance import LLMatcher, LLTokenizer

        definitions = " ".join(token.text for token in self.definitions)
        matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(f"start: {terminal}\n{definitions}"), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        return str(matcher.get_error()).startswith("NoExtensionBias")

    def item_without_rules(self) -> None:
        """A terminal, %ignore, %import or the like, with the lines that go on with another alternative."""
        start = self.at
        self.skip_to("newline")
        while self.kind() == "newline" and self.kind(1) == "|":
            self.at += 1
            self.skip_to("newline")
        if self.tokens[start].kind in ("terminal", "%import"):
            self.definitions += [*self.tokens[start : self.at], Token("newline", "\n")]

    def expansions(self) -> Needs:
        options = [self.expansion()]
        while self.kind() == "|" or (self.kind() == "newline" and self.kind(1) == "|"):
            self.at += 1 if self.kind() == "|" else 2
            options.append(self.expansion())
        return Needs(any, options)

    def expansion(self) -> Needs:
        """A sequence. Of ``a & b``, which are terminals, and what follows it, an alias or a condition, nothing is asked."""
        parts: list[Name | Needs] = []
        while (kind := self.kind()) and kind != "newline" and kind not in _ENDS_OF_AN_EXPANSION:
            atom = self.atom()
            if not self.repeated_from_zero():
                parts.append(atom)
        if self.kind() in ("&", "->", "%if"):
            self.skip_to("newline", "|", ")", "]", "}")
        return Needs(all, parts)

    def repeated_from_zero(self) -> bool:
        """Read what says how often."""
        if self.kind() in ("+", "*", "?"):
            return self.take().text != "+"
        if self.kind() == "~" and self.kind(1) == "number":
            self.at += 1
            least = int(float(self.take().text))
            while self.kind() in (".", "..", "number"):
                self.at += 1
            return least == 0
        if self.kind() == "{":
            self.at += 1
            least = int(float(self.tokens[self.at].text)) if self.kind() == "number" else 0
            self.skip_to("}")
            self.at += 1
            return least == 0
        return False

    def atom(self) -> Name | Needs:
        kind, text, value = self.take()
        if kind == "~":  # all but a terminal
            self.atom()
            return NOTHING
        if kind in ("(", "["):
            inner = self.expansions()
            self.at += 1
            return inner if kind == "(" else NOTHING
        if kind in ("rule", "terminal"):
            if self.kind() == "::":
                self.parameter()
            return self.mention(self.grammar, text)
        if _may_be_empty(self.tokens[self.at - 1]):
            return self.mention(self.grammar, text)
        if kind == "grammar":
            return self.mention(text[1:], "start")
        if kind == "%json":
            return _needs_of_json(value)
        if kind == "%lark":
            return self.nested()
        return NOTHING

    def mention(self, grammar: str, rule: str) -> Name:
        self.mentions.append((grammar, rule))
        return grammar, rule

    def parameter(self) -> None:
        """``::incr(_)``, ``::_``, ``::7``."""
        self.at += 2
        if self.kind() == "(":
            self.at += 1
            self.skip_to(")")
            self.at += 1

    def nested(self) -> Name:
        """``%lark { ... }``: a grammar with rules of its own."""
        self.at += 1
        start = self.at
        self.skip_to("}")
        grammar = f"{self.grammar} {start}"
        _Parser(self.tokens[start : self.at], grammar, self.rules).items()
        self.at += 1
        return self.mention(grammar, "start")
