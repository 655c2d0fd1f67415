"""Users who come along from other products."""
