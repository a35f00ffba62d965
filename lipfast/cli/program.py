"""The program `lipfast`: its commands put together."""

from __future__ import annotations

import gc
import logging
import warnings
from typing import Annotated

import typer

from lipfast._version import __version__
from lipfast.cli.bounds import bounds
from lipfast.cli.info import info
from lipfast.cli.score import score
from lipfast.cli.store import store_app
from lipfast.cli.verify import verify

_FEWEST_NEW = 50_000  # objects since the last collection, before the next one

# torch takes a second to import: each command imports what it needs, and --help nothing of it.

app = typer.Typer(
    name="lipfast",
    help="Certified bounds on the Lipschitz constant of neural networks, for many checkpoints.",
    epilog="""\b
Examples:
  lipfast bounds run/last.safetensors --arch models:mlp --data x.npy
  lipfast verify last.json run/last.safetensors --arch models:mlp
  lipfast score runs/ --arch models:mlp --data x.npy --out scores/
  lipfast store show scores/

'lipfast COMMAND --help' says more. Results go to stdout, progress and errors to stderr.""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (score, bounds, verify, info):
    app.command()(command)
app.add_typer(store_app, name="store")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Answer `--version`."""
    if version:
        typer.echo(f"lipfast {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    # torch warns of its own deprecations while it reads old files: nothing that a user can mend.
    warnings.filterwarnings("ignore", module=r"torch\b")
    # File systems log the errors, with tracebacks, that lipfast reports itself in a line.
    logging.getLogger().addHandler(logging.NullHandler())
    # Imports and traces make a million objects that stay: the collector would go over them often.
    gc.set_threshold(_FEWEST_NEW, *gc.get_threshold()[1:])
    app(prog_name="lipfast")
