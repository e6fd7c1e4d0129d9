"""The parts of secure aggregation; :mod:`lightning_sfubm.privacy.secure_aggregation` is the page to read first."""
