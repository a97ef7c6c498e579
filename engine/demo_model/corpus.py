"""Turn the Python documentation and standard library into training text.

Two kinds of text come out: plain documents, which teach the model English and
Python, and question/answer entries, which teach it to hold a conversation.
"""

from __future__ import annotations

import ast
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

OBJECTS = {
    "function": "function",
    "method": "method",
    "class": "class",
    "data": "variable",
    "exception": "exception",
    "attribute": "attribute",
    "decorator": "decorator",
    "classmethod": "class method",
    "staticmethod": "static method",
    "option": "option",
    "cmdoption": "option",
    "describe": "item",
    "envvar": "environment variable",
    "opcode": "bytecode instruction",
    "coroutinefunction": "coroutine function",
    "c:function": "C function",
    "c:type": "C type",
    "c:macro": "C macro",
    "c:var": "C variable",
}
CODE = {"code-block", "code", "doctest", "testcode", "sourcecode", "parsed-literal"}
ASIDES = {"note": "Note: ", "warning": "Warning: ", "tip": "Tip: ", "impl-detail": "Detail: "}
CONTAINERS = {"glossary", "only", "rubric", "topic", "sidebar", "hlist"}
RULE = re.compile(r"^([=\-~^\"'*#+.`:])\1{2,}\s*$")
TABLE = re.compile(r"^(\+[-=+]+\+|=+( +=+)+)\s*$")
BULLET = re.compile(r"^([*\-+•]|\d+\.|#\.|\(\d+\))\s+")
DIRECTIVE = re.compile(r"^\.\.\s+([\w:.-]+)::\s*(.*)$")


@dataclass
class Block:
    """One piece of a page: head, text, code, term, or an object with children."""

    kind: str
    text: str
    children: list[Block] = field(default_factory=list)


@dataclass
class Entry:
    """Something a user may ask about, with the answer the documentation gives."""

    subject: str
    kind: str
    answer: str
    weight: int = 1


def inline(text: str) -> str:
    """Strip the inline markup of reStructuredText, keeping code in backticks."""
    text = re.sub(r":[\w:+.-]+:`([^`<]+?)\s*<[^`>]+>`", r"\1", text)
    text = re.sub(r":(pep|rfc):`(\d+)", lambda m: f":rfc:`{m[1].upper()} {m[2]}", text)
    text = re.sub(
        r":(?:term|ref|doc|pep|rfc|abbr|keyword|kbd|dfn|source|manpage):`!?~?([^`]+)`",
        lambda m: m[1].rsplit("/", 1)[-1] if "/" in m[1] else m[1],
        text,
    )
    text = re.sub(r":[\w:+.-]+:`~([^`]*\.)?([^`.]+)`", r"`\2`", text)
    text = re.sub(r":[\w:+.-]+:`!?([^`]+)`", r"`\1`", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]+>`__?", r"\1", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"`([^`]+)`__?\b", r"\1", text)
    text = re.sub(r"\s?\[(#\w*|\d+|\w+)\]_", "", text)
    text = re.sub(r"(?<![\w*\\`])\*\*([^*\s][^*]*)\*\*(?![\w*])", r"\1", text)
    text = re.sub(r"(?<![\w*\\`(])\*([^*\s][^*`]*)\*(?![\w*])", r"\1", text)
    text = re.sub(r"(?<=\()\*(\w+)\*(?=\W)", r"\1", text)
    text = re.sub(r"\\([*_`|\\])", r"\1", text)
    text = re.sub(r"(?<=[a-z`])\\(?=s\b)", "", text).replace("|version|", "3.11")
    return re.sub(r"(?<=\S) {2,}", " ", text).replace(" --- ", " - ").strip()


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def take_indented(lines: list[str], start: int, base: int) -> tuple[list[str], int]:
    """Collect the lines deeper than `base` that follow, dedented."""
    end = start
    while end < len(lines) and (not lines[end].strip() or indent_of(lines[end]) > base):
        end += 1
    body = lines[start:end]
    depth = min((indent_of(x) for x in body if x.strip()), default=0)
    body = [x[depth:] for x in body]
    while body and not body[-1].strip():
        body.pop()
    return body, end


def code_block(body: list[str]) -> Block:
    return Block("code", "\n".join("    " + x if x else "" for x in body).strip("\n"))


def directive(name: str, argument: str, body: list[str]) -> list[Block]:
    """Blocks of one directive; the ones that only steer Sphinx give nothing."""
    split = 0
    while split < len(body) and body[split].startswith(":"):
        split += 1
    if name == "module":
        synopsis = [x.split(":", 2)[2].strip() for x in body[:split] if x.startswith(":synopsis")]
        return [Block("module", argument.strip(), [Block("text", inline(x)) for x in synopsis])]
    if name in ("currentmodule", "py:currentmodule"):
        return [Block("module", argument.strip())]
    if name.removeprefix("py:") in OBJECTS:
        while argument.endswith("\\") and body:
            argument, body = argument[:-1] + body[0], body[1:]
        # Further signatures of the same object follow at once, without a blank line.
        while split < len(body) and body[split].strip():
            split += 1
        kind = OBJECTS[name.removeprefix("py:")]
        return [Block(kind, inline(argument), parse(body[split:]))]
    if name in CODE:
        return [code_block(take_indented(body[split:], 0, -1)[0])]
    if name in ASIDES:
        blocks = parse(([argument] if argument else []) + body)
        if blocks and blocks[0].kind == "text":
            blocks[0].text = ASIDES[name] + blocks[0].text
        return blocks
    return parse(body[split:]) if name in CONTAINERS else []


def parse(lines: list[str]) -> list[Block]:
    """Read the block structure of a reStructuredText fragment."""
    blocks: list[Block] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        if not line.strip():
            i += 1
        elif line.startswith(".."):
            body, i = take_indented(lines, i + 1, 0)
            if match := DIRECTIVE.match(line):
                blocks += directive(match[1], match[2], body)
        elif line[0] == " ":
            body, i = take_indented(lines, i, 0)
            blocks += parse(body)
        elif RULE.match(line):
            i += 1
        elif i + 1 < len(lines) and RULE.match(lines[i + 1]) and len(line) > 1:
            blocks.append(Block("head", inline(line)))
            i += 2
        else:
            i = paragraph(lines, i, blocks)
    return blocks


def paragraph(lines: list[str], i: int, blocks: list[Block]) -> int:
    """Append the paragraph at line i, with the literal block it may introduce."""
    start = i
    hanging = BULLET.match(lines[i]) is not None
    while i < len(lines) and lines[i].strip() and (i == start or hanging or lines[i][0] != " "):
        if i > start and BULLET.match(lines[i]):
            break
        i += 1
    chunk = lines[start:i]
    if any(TABLE.match(x) for x in chunk):
        while i < len(lines) and (lines[i].strip() or TABLE.match(lines[min(i + 1, len(lines) - 1)])):
            i += 1
        return i
    text = " ".join(x.strip() for x in chunk)
    if text.startswith(">>>"):
        blocks.append(code_block(chunk))
        return i
    literal = text.endswith("::")
    if i < len(lines) and lines[i].strip() and not hanging and not literal:
        blocks.append(Block("term", inline(text)))
        return i
    text = inline(BULLET.sub("- ", text.removesuffix(":") if literal else text, count=1))
    if text not in ("", ":", "-") and not re.match(r":\w+: ", text):
        blocks.append(Block("text", text))
    if literal:
        body, i = take_indented(lines, i, 0)
        blocks.append(code_block(body))
    return i


def render(blocks: list[Block]) -> str:
    """Write blocks as the plain text that the model reads."""
    parts: list[str] = []
    for block in blocks:
        if block.kind == "module":
            continue
        mark = {"head": "# "}.get(block.kind, "")
        parts.append(mark + block.text)
        if block.children:
            parts.append(render(block.children))
    return re.sub(r"\n\n(?=- )", "\n", "\n\n".join(p for p in parts if p.strip()))


def answer_of(blocks: list[Block], limit: int = 420) -> str:
    """The first paragraphs, cut at the end of a sentence near `limit` characters."""
    text = ""
    for i, block in enumerate(blocks):
        if block.kind not in ("text", "code") or (text and len(text + block.text) > limit):
            break
        introduces = i + 1 == len(blocks) or blocks[i + 1].kind not in ("text", "code")
        if text and introduces and re.search(r":$|[Ff]ollowing \w+( \w+)?[.:]$", block.text):
            break
        text += ("\n" if block.text.startswith("- ") else "\n\n") + block.text
    text = text.strip()
    if len(text) > limit * 1.4:
        stops = [m.end() for m in re.finditer(r"[.!?](?=\s)", text[:limit])]
        text = text[: stops[-1]] if stops else ""
    return re.sub(r"\s*:$", ".", text) if len(text) >= 24 else ""


def entries_of(blocks: list[Block], page: str, scope: str = "") -> Iterator[Entry]:
    """Questions that a page answers: its modules, objects, terms and sections."""
    module = scope
    for i, block in enumerate(blocks):
        after = blocks[i + 1 :]
        if block.kind == "module":
            module = block.text
            synopsis = " ".join(b.text for b in block.children)
            answer = answer_of([b for b in after if not b.text.startswith("Source code")][:6])
            if synopsis:
                lead = f"The `{module}` module: {synopsis.rstrip('.')}."
                yield Entry(module, "module", f"{lead} {answer}".strip(), 5)
        elif block.kind == "term" and page == "glossary":
            if answer := answer_of(after[:2]):
                yield Entry(block.text.strip("`"), "term", answer, 6)
        elif block.kind == "head" and (answer := answer_of(after)):
            asked = block.text.endswith("?")
            yield Entry(block.text, "question" if asked else "section", answer, 4 if asked else 1)
        elif block.kind in OBJECTS.values():
            yield from object_entries(block, page, module)


def object_entries(block: Block, page: str, module: str) -> Iterator[Entry]:
    """The entry of one documented object, and those of its members."""
    bare = re.split(r"[(\s]", re.sub(r"^(class|async|await)\s+", "", block.text), maxsplit=1)[0]
    name = bare
    if module and not block.kind.startswith(("C ", "option", "item", "env", "byte")):
        known = bare.startswith(module + ".") or bare == module
        tail = bare.removeprefix(module.rsplit(".", 1)[-1] + ".")
        name = bare if known else f"{module}.{tail}"
    if name and (answer := answer_of(block.children)):
        signature = block.text if "(" in block.text and len(block.text) < 90 else bare
        article = "an" if block.kind[0] in "aeio" else "a"
        lead = f"`{signature.replace(bare, name, 1)}` is {article} {block.kind}. "
        yield Entry(name, block.kind, lead + answer, 8 if page == "functions" else 1)
    yield from entries_of(block.children, page, name if block.kind in ("class", "exception") else module)


def read_docs(root: Path) -> tuple[list[str], list[Entry]]:
    """Read every page below the Sphinx `_sources` folder, except the change log."""
    texts: list[str] = []
    entries: list[Entry] = []
    for path in sorted(root.rglob("*.rst*")):
        page = path.name.split(".rst")[0]
        folder = path.parent.name
        if page in ("changelog", "license", "contents") or folder in ("distutils", "c-api"):
            continue
        blocks = parse(path.read_text(encoding="utf-8").expandtabs().splitlines())
        texts.append(render(blocks))
        if folder not in ("whatsnew", "extending"):
            entries += entries_of(blocks, page)
    return [t for t in texts if len(t) > 200], entries


def docstring_page(source: str, module: str) -> tuple[str, list[Entry]]:
    """Docstrings and longer comments of one source file, in reading order."""
    found: list[tuple[int, str]] = []
    entries: list[Entry] = []

    def visit(node: ast.AST, scope: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name = f"{scope}.{child.name}"
            if text := ast.get_docstring(child):
                kind = "class" if isinstance(child, ast.ClassDef) else "function"
                found.append((child.lineno, f"{kind} {name}\n\n{text}"))
                answer = answer_of(parse(text.splitlines()))
                if answer and not child.name.startswith("_"):
                    entries.append(Entry(name, kind, f"`{name}` is a {kind}. {answer}"))
            visit(child, name)

    tree = ast.parse(source)
    if text := ast.get_docstring(tree):
        found.append((0, f"module {module}\n\n{text}"))
    visit(tree, module)
    for match in re.finditer(r"(?m)(?:^[ \t]*# .*\n){2,}", source):
        comment = re.sub(r"(?m)^[ \t]*# ?", "", match[0]).strip()
        if len(comment) > 120 and sum(c.isalpha() or c == " " for c in comment) > 0.85 * len(comment):
            found.append((source.count("\n", 0, match.start()), " ".join(comment.split())))
    return "\n\n".join(t for _, t in sorted(found) if "opyright" not in t), entries


def read_stdlib(root: Path) -> tuple[list[str], list[Entry]]:
    """Read the standard library's own modules; bundled third-party code is left out."""
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "pydoc_data"}
    texts: list[str] = []
    entries: list[Entry] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped & set(parts) or any(p.startswith(("_sysconfig", "encodings")) for p in parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                source = path.read_text(encoding="utf-8")
                text, more = docstring_page(source, ".".join(p for p in parts if p != "__init__"))
            except (SyntaxError, UnicodeDecodeError):
                continue
        texts.append(text)
        entries += more
    return [t for t in texts if len(t) > 200], entries


ASK_OBJECT = (
    "What does {n} do?",
    "What is {n}?",
    "Explain {n}.",
    "How does {n} work?",
    "What is {n} for?",
    "Tell me about {n}.",
    "Describe {n}.",
    "What does the {n} {k} do?",
    "How do I use {n}?",
    "Explain the {k} {n}.",
    "What is the {n} {k}?",
    "Can you explain {n}?",
    "{n}",
    "When should I use {n}?",
    "Please explain what {n} does.",
    "What does {n}() do in Python?",
)
ASK_MODULE = (
    "What is the {n} module?",
    "Explain the {n} module.",
    "What does the {n} module do?",
    "What is {n}?",
    "Tell me about the {n} module.",
    "What can I do with {n}?",
    "Explain {n}.",
    "What is the {n} module for?",
    "Describe the Python {n} module.",
    "When should I use {n}?",
)
ASK_TERM = (
    "What is {a}?",
    "What is {a} in Python?",
    "Explain {n}.",
    "Define {n}.",
    "Tell me about {n}.",
    "What does {n} mean?",
    "Can you explain what {a} is?",
    "Explain what {a} is.",
    "What's {a}?",
    "Please explain {n} in Python.",
    "What does the term {n} mean in Python?",
    "{n}",
)
ASK_SECTION = ("Explain this topic: {n}.", "Tell me about {n}.", "{n}", "What about {n} in Python?")


def question_for(entry: Entry, rng: random.Random) -> str:
    """One way in which a user may ask for this entry; typing is often careless."""
    if entry.kind in ("question", "chat"):
        text = entry.subject
    else:
        forms = {"module": ASK_MODULE, "term": ASK_TERM, "section": ASK_SECTION}
        form = rng.choice(forms.get(entry.kind, ASK_OBJECT))
        name = entry.subject if rng.random() < 0.8 else f"`{entry.subject}`"
        article = "an" if entry.subject[:1].lower() in "aeiou" else "a"
        text = form.format(n=name, k=entry.kind, a=f"{article} {name}")
        text = text.replace("()()", "()").replace("?.", "?")
    if rng.random() < 0.15:
        text = text.rstrip("?.!") or text
    return text[0].lower() + text[1:] if rng.random() < 0.15 else text


def read_smalltalk(path: Path) -> list[Entry]:
    """Read the hand-written conversation file next to this script."""
    entries: list[Entry] = []
    for part in re.split(r"\n\n(?=\?)", path.read_text(encoding="utf-8").split("\n\n", 1)[1]):
        lines = part.rstrip().splitlines()
        questions = [x[2:] for x in lines if x.startswith("? ")]
        answer = "\n".join(lines[len(questions) :])
        entries += [Entry(q, "chat", answer, 8) for q in questions]
    return entries


SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant that answers questions about Python.",
    "You are the Baton demo model.",
    "Answer in a few words.",
    "You are an expert Python programmer.",
    "Be brief and friendly.",
    "You answer questions about the Python standard library.",
)


def conversations(entries: list[Entry], rng: random.Random) -> Iterator[str]:
    """Chats in the format of chat_template.jinja that use each entry once per weight.

    Some have a system message and several turns, so that neither surprises the model.
    """
    pool = [entry for entry in entries for _ in range(entry.weight)]
    rng.shuffle(pool)
    while pool:
        text = f"<|system|>{rng.choice(SYSTEM)}<|end|>" if rng.random() < 0.3 else ""
        for _ in range(rng.choices((1, 2, 3, 8), (60, 22, 14, 4))[0]):
            if pool:
                entry = pool.pop()
                question = question_for(entry, rng)
                text += f"<|user|>{question}<|end|><|assistant|>{entry.answer}<|end|>"
        yield text
