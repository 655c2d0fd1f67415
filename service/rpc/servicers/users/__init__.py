"""The servicer of UserService, and the validation of its requests."""
