"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="File, folder, or org/name@revision; name=MODEL names it.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="RUN", help="Write a run folder, with report.html.")
]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="Metrics or groups of them, separated by commas; all is everything but p-values."
    ),
]
Select = Annotated[
    str | None,
    typer.Option(metavar="TERMS", help="Matrices, such as 'layers 0-7, attn.q, attn.o'; all by default."),
]
Heads = Annotated[bool, typer.Option("--heads/--no-heads", help="Cut attention projections into heads.")]
Circuits = Annotated[bool, typer.Option("--circuits", help="Analyse the qk and ov circuits of each head too.")]
Vectors = Annotated[bool, typer.Option("--vectors", help="Save singular vectors too, as float32 safetensors.")]
ArchitectureFile = Annotated[
    Path | None,
    typer.Option("--architecture", metavar="FILE", help="JSON that describes the model (docs/architectures.md)."),
]
AdapterBase = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Base of a LoRA adapter whose config names none that can be opened."),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch a hub model whole instead of reading byte ranges.")]
Method = Annotated[str, typer.Option(metavar="NAME", help="auto, or exact for LAPACK throughout.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto (CUDA where there is one), cpu or cuda.")]
Engine = Annotated[str, typer.Option(metavar="NAME", help="local.")]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Use and keep results (DIFFRACT_CACHE_DIR says where).")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing run folder.")]
AllowUnmatched = Annotated[
    bool, typer.Option("--allow-unmatched", help="Go on when more than embeddings have no partner.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print a summary as JSON, for scripts.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
