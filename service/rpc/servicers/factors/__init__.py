"""Second factors on the wire."""
