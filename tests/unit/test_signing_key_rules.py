"""What each signing key does, by the clock."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from service.core.signing_keys.rules import State, StoredKey, forgettable, signing_key, state_of


class TestRules:
    """What each key does, by the clock."""

    NOW = datetime.fromisoformat("2026-11-30T12:00:00+00:00")

    def keys(self, *activations: float, revoked: Sequence[int] = ()) -> list[StoredKey]:
        """Keys that sign from so many hours before now on."""
        return [
            StoredKey(
                str(number),
                b"",
                self.NOW,
                self.NOW - timedelta(hours=hours),
                self.NOW - timedelta(hours=1) if number in revoked else None,
            )
            for number, hours in enumerate(activations)
        ]

    def test_states(self) -> None:
        keys = self.keys(30, 10, -5, 0)
        assert [state_of(key, keys, self.NOW) for key in keys] == [
            State.RETIRED,
            State.RETIRED,
            State.NEXT,
            State.SIGNING,
        ]
        assert signing_key(self.keys(30, 10, revoked=[1]), self.NOW) == self.keys(30)[0]
        assert signing_key([], self.NOW) is None

    def test_a_key_is_forgotten_two_hours_after_its_last_token(self) -> None:
        assert forgettable(self.keys(30, 10, 1.5), self.NOW) == ["0"]
        assert forgettable(self.keys(30, 10, 2), self.NOW) == ["0", "1"]
        assert forgettable(self.keys(30, revoked=[0]), self.NOW) == []
