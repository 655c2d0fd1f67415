"""Generated from protos/personae/v1 by `make proto`: never edited."""
