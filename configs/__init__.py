"""YAML configurations shipped with the package; see ``lightning-sfubm fit --help``."""

if not __name__.startswith("lightning_sfubm."):
    raise ImportError(
        "import this package as 'lightning_sfubm.configs': the folder at the repository root holds its source, "
        "and importing it as 'configs' would create a second copy of every class"
    )
