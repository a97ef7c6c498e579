"""`baton complete`: continue a text, printing tokens as they come."""

import argparse

from baton.client import DEFAULT_URL, Client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the text to continue")
    add_client_arguments(parser)


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that asks a server shares."""
    parser.add_argument("--url", default=DEFAULT_URL, help="where the coordinator is (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=None, help="0 is greedy (default: the model's own)")
    parser.add_argument("--seed", type=int, default=None, help="same seed, same answer")


def sampling_of(arguments: argparse.Namespace) -> dict[str, float | int]:
    """The request's sampling fields that were given."""
    fields = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "seed")}
    return {name: value for name, value in fields.items() if value is not None}


def run(arguments: argparse.Namespace) -> int:
    with Client(arguments.url) as client:
        for delta in client.complete(arguments.prompt, **sampling_of(arguments)):
            print(delta.text, end="", flush=True)
    print()
    return 0
