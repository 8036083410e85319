"""``eqvision config RECIPE``: the resolved configuration of a run, without running it."""

from eqvision.commands.arguments import parse_recipe


def run(arguments: list[str]) -> None:
    """YAML on standard output; ``eqvision train RECIPE --config FILE`` reads it back."""
    config = parse_recipe(arguments, "eqvision config")
    if config is None:
        return
    import yaml

    from eqvision.recipes import to_dict

    print(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=1000), end="")
