"""The audit of a finished run: recorded messages checked against the ledger, attacks on them, the privacy report."""
