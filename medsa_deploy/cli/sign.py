"""medsa-deploy sign: a bundle and a private key → a signature beside the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from medsa_deploy import stages

from . import console
from .options import Bundle, Json


def sign(
    bundle: Bundle,
    key: Annotated[
        Path,
        typer.Option(
            metavar="KEY.pem",
            help="Private key on P-256, P-384 or P-521; its password, if any, in "
            "$MEDSA_KEY_PASSWORD",
        ),
    ],
    json: Json = False,
) -> None:
    """Sign a bundle, so that a device can tell whose it is.

    Sign again after quantize, build-engine, build-kernels and verify with a report.

    medsa-deploy sign ckpt.medsa --key key.pem
    """
    signing = stages.sign_bundle(bundle, key)
    if json:
        console.print_json(signing)
        return
    console.out.print(
        f"[bold green]{escape(str(signing.signature))}[/]  {signing.files} files signed by "
        f"{signing.signer[:16]}"
    )
