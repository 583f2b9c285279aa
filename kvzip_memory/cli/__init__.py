"""``kvzip-memory``: what lies in a cache folder, and what to do about it."""

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from kvzip_memory import __version__
from kvzip_memory.cli import contexts, conversions, folder, removing, sessions
from kvzip_memory.cli.terminal import shown
from kvzip_memory.errors import KVzipError

app = typer.Typer(no_args_is_help=True, add_completion=False)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvzip-memory {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="show the version and exit")] = False,
) -> None:
    """Contexts in a cache folder: load, look, pin, delete, check.

    The folder's secret, if it has one, is in KVZIP_MEMORY_SECRET, or in the file that KVZIP_MEMORY_SECRET_FILE names.
    """


#: In the order in which --help lists them.
COMMANDS: dict[str, Callable[..., None]] = {
    "load": contexts.load,
    "ls": contexts.list_,
    "show": contexts.show,
    "pin": contexts.pin,
    "unpin": contexts.unpin,
    "rm": removing.rm,
    "sessions": sessions.sessions,
    "conversions": conversions.list_conversions,
    "verify": contexts.verify,
    "gc": folder.gc,
    "stats": folder.stats,
    "doctor": folder.doctor,
}
for _name, _command in COMMANDS.items():
    app.command(name=_name)(_command)


def main() -> None:
    """Entry point: errors of ours are one line, not a traceback."""
    try:
        app()
    except (KVzipError, OSError) as error:
        Console(stderr=True, emoji=False).print(f"[red]error:[/] {shown(' '.join(str(error).split(chr(10))))}")
        raise SystemExit(2) from None


__all__ = ["app", "main"]
