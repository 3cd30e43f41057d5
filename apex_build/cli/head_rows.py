"""`--mtp-rows`, where an imatrix with data of the draft head is used."""

from __future__ import annotations

import click

from apex_build.gguf_model.mtp_rows import AUTO, CHOICES, Rows

mtp_rows_option = click.option(
    "--mtp-rows",
    type=click.Choice([AUTO, *CHOICES]),
    default=AUTO,
    show_default=True,
    help="Hidden rows that the draft head was trained on: before or after the final norm. auto: what is known of its architecture.",
)


def rows_of(choice: str) -> Rows | None:
    return CHOICES.get(choice)
