"""Data: readers, splits, candidate batches, text, prompts and the LightningDataModule of a domain."""

if not __name__.startswith("lightning_sfubm."):
    raise ImportError(
        "import this package as 'lightning_sfubm.datamodules': the folder at the repository root holds its source, "
        "and importing it as 'datamodules' would create a second copy of every class"
    )
