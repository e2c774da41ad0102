"""Whether the replica that has an answer is still alive."""

import asyncio

from chatproxy.config.timing import Timing
from chatproxy.services.redis.commands import Commands
from chatproxy.services.redis.scripts import Keys


class Liveness:
    """Looks at one replica's lease, as often as it is asked."""

    def __init__(self, commands: Commands, keys: Keys, timing: Timing) -> None:
        self._commands = commands
        self._keys = keys
        self._timing = timing
        self._missing_since: float | None = None

    async def is_over(self, owner: str) -> bool:
        """Whether that replica is dead: its lease was missing for a while. Raises StoreUnavailable."""
        commands, now = self._commands, asyncio.get_running_loop().time()
        [alive] = await commands.execute(("EXISTS", self._keys.lease(owner)))
        # A server that was just started, or reached again after a while, may not know the leases yet. A connection
        # that was lost for a moment is no reason to wait: some are lost every few seconds.
        if alive or now - commands.reached_at < self._timing.lease:
            self._missing_since = None
            return False
        self._missing_since = max(self._missing_since or now, commands.connected_at)
        return now - self._missing_since >= self._timing.sweep_interval * 0.9  # two looks have missed it
