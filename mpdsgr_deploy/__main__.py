"""Run the `mpdsgr` command by `python -m mpdsgr_deploy`."""

from mpdsgr_deploy.cli import main

main()
