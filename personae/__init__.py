"""What callers of Personae import: the generated stubs in personae.v1."""
