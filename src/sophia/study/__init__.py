"""The judge: a fair race between optimizers, from the study file to the numbers of the report (docs/protocol.md)."""
