"""What is said below the commands names parameters, which only the command line spells as flags."""

import ast
import re

from test_rooms import FILES, FLOOR, room_of

#: What writes a command line for a person to repeat, which is no message.
COMMAND_LINE = "secateur.recipes.command_line"
# A whole command, and what pip is given, are spelled so everywhere.
_COMMAND = re.compile(r"`secateur [^`]*`|pip install .*")
_FLAG = re.compile(r"(?<![\w-])--[a-z{]")


class Literals(ast.NodeVisitor):
    """The text of all strings but docstrings, with `{}` for what is formatted into one."""

    def __init__(self):
        self.found = []

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_JoinedStr(self, node):
        self.found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                self.visit(part.value)

    def visit_Constant(self, node):
        if isinstance(node.value, str):
            self.found.append(node.value)


def flags_in(code):
    visitor = Literals()
    visitor.visit(ast.parse(code))
    return [text for text in visitor.found if _FLAG.search(_COMMAND.sub("", text))]


def test_messages_below_the_commands_name_no_flags():
    found = {
        module: flags_in(file.read_text(encoding="utf-8"))
        for module, file in FILES.items()
        if FLOOR[room_of(module)] < FLOOR["commands"] and module != COMMAND_LINE
    }
    assert {module: texts for module, texts in found.items() if texts} == {}


def test_flags_are_found():
    assert flags_in('say("give --this")') == ["give --this"]
    assert flags_in("say(f\"{x} or {y or '--that'}\")") == ["--that"]
    assert flags_in('def f():\n    """About --this."""\n    say("`secateur export --to dense`, a--b, ---")') == []
    assert flags_in('say(f"`secateur gate {x} --write`, or --write")') == ["`secateur gate {} --write`, or --write"]
