"""The option --backend, apart from `output` because it loads the runtimes, which most commands do without."""

import click

from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND

backend_option = click.option(
    "--backend",
    default=DEFAULT_BACKEND,
    show_default=True,
    help="Runtime of the network; `mpdsgr doctor` lists all. None has run on a GPU yet.",
)
