"""The command `jax-moe`: parses the arguments, runs the subcommand, returns an exit status."""

import os
import signal
import sys

import jax_moe
from jax_moe import process
from moe_cli.arguments import Compiles, Generate, Inspect, Parity, Port, Routing, in_shell, parse


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0; 1 for wrong input (one line on stderr); 2 for a wrong command line.

    130 after Ctrl-C. Without `arguments` it is the process's own command: a second Ctrl-C ends it at once.
    """
    process.any_encoding()
    if arguments is None:
        process.own()
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:  # the reader of the pipe, such as head, has stopped
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except (ValueError, OSError) as error:
        print(f"jax-moe: error: {in_shell(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        if arguments is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"jax-moe: interrupted{f': {stopped}' if str(stopped) else ''}", file=sys.stderr)
        return process.INTERRUPTED


def run(words: list[str]) -> int:
    """Runs the command that the words ask for; its exit status."""
    if words == ["--version"]:
        print(f"jax-moe {jax_moe.__version__}")
        return 0
    if words[:1] == ["train"]:  # its settings are read where they are used
        from moe_cli.train import train

        train(words[1:])
    command = parse(words)
    if isinstance(command, Compiles) and command.compilation_cache:
        from jax_moe.programs import keep_programs

        keep_programs()
    if isinstance(command, Port):
        from moe_cli.port import port

        return port(command)
    if isinstance(command, Inspect):
        from moe_cli.inspect import inspect

        return inspect(command)
    if isinstance(command, Generate):
        from moe_cli.generate import generate

        return generate(command)
    if isinstance(command, Routing):
        from moe_cli.routing import routing

        return routing(command)
    assert isinstance(command, Parity)
    if command.train is not None:
        from moe_cli.train_parity import train_parity

        return train_parity(command)
    from moe_cli.parity import parity

    return parity(command)
