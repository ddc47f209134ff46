"""mpdsgr recipes"""

from pathlib import Path

import click

from mpdsgr_deploy.cli.output import json_option, print_json, print_table
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.recipes import built_in_recipes, find_recipe, title


@click.command("recipes")
@click.option("--copy", "name", metavar="NAME", help="Copy a recipe here, to edit it.")
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the built-in recipes, or copy one into the current directory.

    \b
    Example:
      mpdsgr recipes --copy digits-mpdsgr
    """
    if name is not None:
        source = find_recipe(name)
        target = Path(source.name)
        if target.exists():
            raise InputError(f"{target} already exists here; rename it first")
        write_atomic(target, source.read_bytes())
        if as_json:
            print_json({"copied": str(target)})
        else:
            click.echo(f"copied to {target}; next: mpdsgr train {target}")
        return
    found = {name: title(path) for name, path in built_in_recipes().items()}
    if as_json:
        print_json(found)
    else:
        print_table(("recipe", "what it is"), list(found.items()))
