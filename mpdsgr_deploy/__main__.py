"""`python -m mpdsgr_deploy` is the `mpdsgr` command."""

from mpdsgr_deploy.cli import main

main()
