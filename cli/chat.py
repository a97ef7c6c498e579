"""`baton chat`: a conversation in the terminal. An empty line or Ctrl-D ends it; Ctrl-C stops an answer."""

import argparse
import contextlib
import sys

from baton.client import Client
from cli.complete import add_client_arguments, client_of, sampling_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("message", nargs="?", help="ask this one question and exit")
    parser.add_argument("--system", help="system message")
    add_client_arguments(parser)


def _answer(client: Client, arguments: argparse.Namespace, messages: list[dict[str, str]]) -> str:
    pieces: list[str] = []
    for delta in client.chat(messages, **sampling_of(arguments)):
        pieces.append(delta.text)
        print(delta.text, end="", flush=True)
    print()
    return "".join(pieces)


def _ask() -> str:
    with contextlib.suppress(EOFError):
        return input("> " if sys.stdin.isatty() else "").strip()
    return ""


def run(arguments: argparse.Namespace) -> int:
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    with client_of(arguments) as client:
        if arguments.message:
            _answer(client, arguments, [*messages, {"role": "user", "content": arguments.message}])
            return 0
        while question := _ask():
            messages.append({"role": "user", "content": question})
            try:
                messages.append({"role": "assistant", "content": _answer(client, arguments, messages)})
            except KeyboardInterrupt:
                print(" (stopped)")
                messages.pop()
    return 0
