"""A model's chat template, run as `transformers` runs it: Jinja2 in a sandbox, with a few helpers.

Templates come with models from anywhere, so they run sandboxed; messages come from clients, so no error repeats them.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.errors import InvalidRequestError, ModelError

_TEMPLATE_BUGS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class _GenerationBlock(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - the attribute is declared by jinja2

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return str(caller())


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """`special_tokens` are variables of the template: bos_token, eos_token and so on."""

    def __init__(self, source: str, origin: str, special_tokens: Mapping[str, str]) -> None:
        """`origin` names the file for the ModelError of a template that cannot be compiled."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{origin}: the chat template has an error in line {error.lineno}: {error}") from error
        # Every rendering copies them; of the chain of maps that they come in that takes longer than all the rest.
        self._template.globals = dict(self._template.globals)
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, str]], extra: Mapping[str, Any], add_generation_prompt: bool = True
    ) -> str:
        """The prompt for these messages, ready for the assistant's answer or not. Raises InvalidRequestError.

        `extra` are further variables that the client sets, such as enable_thinking.
        """
        variables: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens, **extra}
        variables.update(messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt)
        try:
            return self._template.render(variables)
        except jinja2.TemplateError as error:
            detail = str(error)
            if any(len(content := message["content"]) > 2 and content in detail for message in messages):
                detail = "its own message would repeat the prompt"
            raise InvalidRequestError(f"the chat template refuses these messages: {detail}", "messages") from None
        except _TEMPLATE_BUGS as error:
            raise InvalidRequestError(
                f"the chat template of this model cannot render these messages ({type(error).__name__})", "messages"
            ) from None
