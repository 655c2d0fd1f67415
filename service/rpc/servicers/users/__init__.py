"""UserService, and its requests as the rules take them."""
