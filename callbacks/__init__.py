"""Lightning and federated callbacks: privacy noise, progress, results, dashboards."""

if not __name__.startswith("lightning_sfubm."):
    raise ImportError(
        "import this package as 'lightning_sfubm.callbacks': the folder at the repository root holds its source, "
        "and importing it as 'callbacks' would create a second copy of every class"
    )
