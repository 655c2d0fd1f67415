"""Moving users in and out: which rows may come in (rules), importing them, exporting them."""
