"""Options and arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Reference = Annotated[str, typer.Argument(help="a name, a key, or the first 8 digits of a key")]
Tenant = Annotated[
    str | None,
    typer.Option(
        envvar="KVZIP_MEMORY_TENANT",
        help="whose: a tenant, the first 8 digits of its digest as ls shows it (all 64 if it has only sessions), or - for what is nobody's",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
CacheDir = Annotated[Path, typer.Option(envvar="KVZIP_MEMORY_CACHE_DIR", help="the folder given to the engine as cache_dir")]
DEFAULT = Path("~/.cache/kvzip_memory")
