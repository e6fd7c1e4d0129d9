"""Models: one component a file. Plain modules, losses and the LightningModules of the card."""

if not __name__.startswith("lightning_sfubm."):
    raise ImportError(
        "import this package as 'lightning_sfubm.modules': the folder at the repository root holds its source, "
        "and importing it as 'modules' would create a second copy of every class"
    )
