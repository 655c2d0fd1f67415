"""Creates users in a Django project. Imported by a process with that project's settings."""

from django.contrib.auth import get_user_model, hashers

HASHERS = ("PBKDF2", "PBKDF2SHA1", "Argon2", "BCryptSHA256", "BCrypt", "Scrypt", "MD5")
"""The names of all hashers that Django ships, without their suffix."""


class Quick(hashers.PBKDF2PasswordHasher):  # type: ignore[misc]  # Django has no types
    """Django's default, with fewer iterations in the way that its documentation describes."""

    iterations = 1000


def create(count: int, password: str) -> None:
    """Create users: one with a hash of each hasher at its default cost, the others with a quick one.

    Some are valid in Django, but not in Personae.
    """
    users = get_user_model().objects
    create_user = users.create_user
    for name in HASHERS:
        user = create_user(name.lower(), f"{name.lower()}@example.com")
        user.password = hashers.make_password(password, hasher=getattr(hashers, f"{name}PasswordHasher")())
        user.save()
    create_user("inactive", "inactive@example.com", password, is_active=False)
    create_user("nameless", "", password)
    create_user("twin", "twins@example.com", password)
    create_user("other-twin", "twins@example.com", password)
    create_user("Twin", "capital@example.com", password)
    create_user("eve@example.com", "eve@example.com", password)
    users.create_superuser("root", "root@example.com", password)
    unusable = create_user("unusable", "unusable@example.com", password)
    unusable.set_unusable_password()
    unusable.save()
    for number in range(count - users.count()):
        create_user(f"user{number}", f"user{number}@example.com", password)
