"""mpdsgr recipes"""

from pathlib import Path

import click

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.cli.output import json_option, print_json, print_table
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipes import Published, built_in_recipes, find_recipe, flattened, published, title


@click.command("recipes")
@click.option(
    "--copy", "name", metavar="NAME", help="Copy a recipe into the current directory, as one file that you can edit."
)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the built-in recipes, or copy one to edit it.

    A recipe is a TOML file that describes the data, the network and the training. The list shows the accuracies that a
    paper has published for it. A copy also contains the settings of the recipes that it extends.

    \b
    Example:
      mpdsgr recipes
      mpdsgr recipes --copy digits-mpdsgr
    """
    if name is not None:
        source = find_recipe(name)
        target = Path(source.name)
        if target.exists():
            raise InputError(f"{target} already exists in this directory; rename or remove it first")
        write_atomic(target, flattened(source).encode())
        if as_json:
            print_json({"copied": str(target)})
        else:
            click.echo(f"copied to {target}; next: mpdsgr train {target}")
        return
    recipes = {name: (title(path), published(path)) for name, path in built_in_recipes().items()}
    if as_json:
        print_json({name: {"title": what, "published": p and p.model_dump()} for name, (what, p) in recipes.items()})
    else:
        rows = [(name, what, *figures(p)) for name, (what, p) in recipes.items()]
        print_table(
            ("recipe", "what it is", "clean", "noise", "FGSM", "PGD", "BIM"),
            rows,
            "recipes, and accuracies in % that a paper has published for them",
        )


def figures(stated: Published | None) -> list[str]:
    """Return the published accuracies in %, clean and under Gaussian noise, FGSM, PGD and BIM; "" if there is none."""
    values = (stated.clean, stated.gaussian, stated.fgsm, stated.pgd, stated.bim) if stated else [None] * 5
    return ["" if value is None else f"{value:.2f}" for value in values]
