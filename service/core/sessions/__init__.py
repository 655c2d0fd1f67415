"""Sessions: people who are signed in, and the tokens that they hold."""
