"""Entry point of the `baton` command: finds the subcommand, imports only that, and turns errors into exit codes."""

import argparse
import importlib
import os
import select
import signal
import sys

from baton.errors import BatonError, ConfigurationError
from baton.log_format import LOG_FORMAT_VARIABLE

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("cli.serve", "run the whole system on this machine"),
    "coordinator": ("cli.coordinator", "run the front door alone"),
    "prefill": ("cli.worker", "run one prefill worker"),
    "decode": ("cli.worker", "run one decode worker"),
    "mixed": ("cli.worker", "run one worker that carries both roles"),
    "fake": ("cli.fake", "run workers that compute nothing, to try or measure a coordinator alone"),
    "complete": ("cli.complete", "continue a text, streaming"),
    "chat": ("cli.chat", "talk to the model, streaming"),
    "status": ("cli.status", "show workers, roles, blocks and load"),
    "top": ("cli.top", "watch pools, workers, requests and faults, as the dashboard shows them"),
    "trace": ("cli.trace", "show where the time of one request went"),
    "drain": ("cli.drain", "have workers finish what they run and end"),
    "key": ("cli.key", "make API keys of tenants"),
    "audit": ("cli.audit", "check the audit log of tenants' requests"),
    "profile": ("cli.profile", "measure a model on this machine: cost table, trace, and where each millisecond goes"),
    "bench": ("cli.bench.command", "send load to a server, and say what its users would see"),
    "doctor": ("cli.doctor", "show what this host offers for moving KV blocks, and measure every lane"),
}
EXIT_USAGE = 2


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="baton", description="Serve large language models, prefill and decode apart.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = next((word for word in argv if word in COMMANDS), None)
    for name, (module, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        command.add_argument(
            "--log-format", choices=("text", "json"),
            help=f"how lines of the log look (default: {LOG_FORMAT_VARIABLE} of the environment, or text)",
        )  # fmt: skip
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    arguments = parser.parse_args(argv)
    if arguments.version:
        from importlib.metadata import version

        print(version("baton-serve"))
        sys.exit(0)
    if arguments.command is None:
        parser.print_help()
        sys.exit(EXIT_USAGE)
    return arguments


def main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's own notes about links that come and go are not ours
    if os.getpid() == 1:
        # The first process of a container: without a handler the kernel drops the signal, which comes once.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arguments = parse(sys.argv[1:])
    if arguments.log_format:
        os.environ[LOG_FORMAT_VARIABLE] = arguments.log_format
    try:
        sys.exit(importlib.import_module(COMMANDS[arguments.command][0]).run(arguments))
    except ConfigurationError as error:
        print(f"baton {arguments.command}: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except BatonError as error:
        print(f"baton {arguments.command}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        sys.exit(128 + signal.SIGPIPE)


def _reader_left() -> bool:
    """Nobody reads our output any more, such as `head` when it has enough."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


if __name__ == "__main__":
    main()
