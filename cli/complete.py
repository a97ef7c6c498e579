"""`baton complete`: continue a text, printing tokens as they come."""

import argparse
import os

from baton.client import API_KEY_VARIABLE, DEFAULT_URL, URL_VARIABLE, Client, read_api_key, trusting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the text to continue")
    add_client_arguments(parser)


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that asks for an answer shares."""
    add_server_arguments(parser)
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=None, help="0 is greedy (default: the model's own)")
    parser.add_argument("--seed", type=int, default=None, help="same seed, same answer")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that asks a server shares."""
    parser.add_argument(
        "--url", default=os.environ.get(URL_VARIABLE) or DEFAULT_URL,
        help=f"where the coordinator is; {URL_VARIABLE} of the environment is the default (now: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ca", default="", metavar="FILE",
        help="PEM certificates of the authority of an https:// server; default: the system's, or SSL_CERT_FILE's",
    )  # fmt: skip
    parser.add_argument("--client-cert", default="", metavar="FILE", help="PEM certificate to show to it, if it asks")
    parser.add_argument(
        "--api-key-file", default="", metavar="FILE",
        help=f"file with the API key, for nobody else to read; default: {API_KEY_VARIABLE} of the environment",
    )  # fmt: skip
    parser.add_argument("--client-key", default="", metavar="FILE", help="PEM private key of that certificate")


def client_of(arguments: argparse.Namespace) -> Client:
    key = read_api_key(arguments.api_key_file) if arguments.api_key_file else None
    return Client(arguments.url, tls=trusting(arguments.ca, arguments.client_cert, arguments.client_key), api_key=key)


def sampling_of(arguments: argparse.Namespace) -> dict[str, float | int]:
    """The request's sampling fields that were given."""
    fields = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "seed")}
    return {name: value for name, value in fields.items() if value is not None}


def run(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        for delta in client.complete(arguments.prompt, **sampling_of(arguments)):
            print(delta.text, end="", flush=True)
    print()
    return 0
