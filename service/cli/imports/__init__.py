"""`python -m service users import`: files of other products, in batches, that go on after a stop."""
